#!/usr/bin/env bash
# Find a Docker engine that builds with BuildKit, or start one from this distribution's packages.
#
#   eval "$(tools/docker_engine.sh find)"             export DOCKER_HOST and DOCKER (the client) of a running engine
#   eval "$(tools/docker_engine.sh start FOLDER)"     the same; if none answers, start dockerd with all its files in FOLDER
#   tools/docker_engine.sh stop FOLDER                stop the engine that `start FOLDER` started
#   tools/docker_engine.sh base [SUITE]               build localhost/base:SUITE from the distribution's mirror and print its name
#
# `start` and `base` need root on Debian or Ubuntu, and install docker.io and debootstrap if they are missing. On failure, each
# command prints the reason to standard error and exits with 1.
set -euo pipefail

die() { echo "docker_engine.sh: $*" >&2; exit 1; }

# Docker clients 23 and later need the buildx plugin to build. Older ones contain BuildKit.
usable() { # CLIENT HOST
  local version
  version=$(DOCKER_HOST=$2 "$1" version --format '{{.Client.Version}} {{.Server.Version}}' 2>/dev/null) || return 1
  [[ ${version%%.*} -lt 23 ]] || "$1" buildx version >/dev/null 2>&1
}

find_engine() { # HOST...: try DOCKER_HOST, then docker's default, then these
  local host client
  for host in "${DOCKER_HOST:-}" unix:///var/run/docker.sock "$@"; do
    [[ -n $host ]] || continue
    # If DOCKER names a client, try no other one.
    for client in ${DOCKER:-docker /usr/bin/docker}; do
      if usable "$client" "$host"; then
        printf 'export DOCKER_HOST=%q DOCKER=%q DOCKER_BUILDKIT=1\n' "$host" "$client"
        return
      fi
    done
  done
  return 1
}

packages() { # NAME...: install those that are missing
  local name missing=()
  for name; do dpkg-query --show --showformat '${db:Status-Abbrev}' "$name" 2>/dev/null | grep -q '^ii' || missing+=("$name"); done
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null || die "this is no Debian or Ubuntu: install ${missing[*]} by hand"
  ((EUID == 0)) || die "needs root to install ${missing[*]}"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends "${missing[@]}"; } >&2 ||
    die "apt-get could not install ${missing[*]}"
}

start() {
  local folder=$1 host=unix://$1/docker.sock options=()
  find_engine "$host" && return
  ((EUID == 0)) || die "no Docker engine answers, and only root can start one"
  packages docker.io iptables
  mkdir -p "$folder"
  if (((0x$(awk '/^CapEff/ { print $2 }' /proc/self/status) >> 24 & 1) == 0)); then
    # In a sandbox root may lack CAP_SYS_RESOURCE; then runc can neither lower an OOM score nor raise a limit.
    cat >"$folder/runc" <<'RUNC'
#!/usr/bin/env python3
import json, os, pathlib, sys
for option, value in zip(sys.argv, sys.argv[1:]):
    config = pathlib.Path(value, "config.json")
    if option == "--bundle" and config.is_file():
        spec = json.loads(config.read_text())
        spec["process"].pop("rlimits", None)
        spec["process"]["oomScoreAdj"] = max(0, spec["process"].get("oomScoreAdj") or 0)
        config.write_text(json.dumps(spec))
os.execv("/usr/sbin/runc", ["runc", *sys.argv[1:]])
RUNC
    chmod +x "$folder/runc"
    options=(--add-runtime "plain=$folder/runc" --default-runtime plain)
  fi
  setsid dockerd --host "$host" --data-root "$folder/data" --exec-root "$folder/exec" --pidfile "$folder/dockerd.pid" \
    "${options[@]}" >"$folder/dockerd.log" 2>&1 </dev/null &
  local left
  for ((left = 120; left > 0; left--)); do
    find_engine "$host" && return
    sleep 0.5
  done
  tail -n 5 "$folder/dockerd.log" >&2
  stop "$folder"
  die "dockerd did not come up within a minute; the end of its log is above"
}

stop() {
  local folder=$1 pid
  [[ -f $folder/dockerd.pid ]] || return 0
  pid=$(<"$folder/dockerd.pid")
  kill "$pid" 2>/dev/null || return 0
  while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
  # dockerd leaves its network namespace mounted.
  awk -v folder="$folder/" 'index($2, folder) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r -n 1 umount
}

base() {
  local suite=$1 engine mirror name=localhost/base:$1
  engine=$(find_engine) || die "no Docker engine answers"
  eval "$engine"
  if ! "$DOCKER" image inspect "$name" >/dev/null 2>&1; then
    packages debootstrap
    mirror=$(apt-cache policy | sed -n "s|^ *[0-9]* \([^ ]*\) $suite/main .*|\1|p" | head -n 1)
    root=$(mktemp -d) # global, because the trap runs after the function has returned
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase "$suite" "$root" ${mirror:+"$mirror"} >&2 || die "debootstrap of $suite failed"
    tar -C "$root" --exclude='./var/cache/apt/archives/*.deb' --exclude='./var/lib/apt/lists/*' -c . | "$DOCKER" import - "$name" >/dev/null
  fi
  echo "$name"
}

case ${1:-} in
  find) find_engine || die "no Docker engine answers (DOCKER_HOST, /var/run/docker.sock), or its client lacks BuildKit" ;;
  start) start "$(realpath -m "${2:?a folder}")" ;;
  stop) stop "$(realpath -m "${2:?a folder}")" ;;
  base) base "${2:-$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)}" ;;
  *) sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
