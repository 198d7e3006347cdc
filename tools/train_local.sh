#!/usr/bin/env bash
# Train in the image on this machine: make train-local BLOOD_TYPE=A.
#
#   BLOOD_TYPE    A, B, O, AB, several as A,B, or all
#   DEVICE        cuda (default): one NVIDIA GPU and the default base; cpu: the CPU image and the tiny base
#   DATA, OUTPUT  a folder on this machine (default: data, outputs), or s3://...
#   GPUS          docker run --gpus (default: all; on a machine with several, GPUS=device=0)
#   IMAGE         another image (default: the one that make image or make image-cpu builds)
#   CACHE, JOB    Docker volumes or folders: CACHE for models and compiled code, JOB for scratch
#   NETWORK       docker run --network, such as host for S3 on this machine's loopback
#   ARGS          more arguments of `lora-trainer run`, separated by spaces: ARGS='--epochs 1 --set lora.r=32'
#   DRY_RUN=1     print the command; needs neither Docker nor a GPU
#
# The script passes HF_TOKEN, AWS_*, LORA_TRAINER_* and the like by name, so that no value appears in the command line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "train_local.sh: $*" >&2; exit 2; }

device=${DEVICE:-cuda} dry_run=${DRY_RUN:-}
case $device in
  cuda) variant=gpu build=image ;;
  cpu) variant=cpu build=image-cpu ;;
  *) die "DEVICE=$device: expected cuda or cpu" ;;
esac
[[ -n ${BLOOD_TYPE:-} ]] || die "BLOOD_TYPE is not set: make train-local BLOOD_TYPE=A (or B, O, AB, several as A,B, or all)"
image=${IMAGE:-localhost/lora-trainer:$variant}

check() { # report missing prerequisites that Docker's own errors would explain poorly
  local engine program toolkit=
  if ! command -v docker >/dev/null; then
    die "Docker is not installed (no docker command): install Docker Engine, or print the command with DRY_RUN=1"
  fi
  engine=$(tools/docker_engine.sh find) ||
    die "Docker does not answer: start it, give this user access to it, or set DOCKER_HOST; DRY_RUN=1 only prints the command"
  eval "$engine"
  if [[ $device == cuda ]]; then
    nvidia-smi --list-gpus >/dev/null 2>&1 ||
      die "no NVIDIA GPU or no driver: nvidia-smi finds none. Without a GPU: make train-local DEVICE=cpu BLOOD_TYPE=$BLOOD_TYPE"
    for program in nvidia-ctk nvidia-container-cli nvidia-container-runtime-hook; do
      command -v "$program" >/dev/null && toolkit=$program
    done
    [[ -n $toolkit ]] || die "the NVIDIA Container Toolkit is missing; Docker needs it to pass a GPU on: install nvidia-container-toolkit"
  fi
  "$DOCKER" image inspect "$image" >/dev/null 2>&1 || die "there is no image $image: make $build, or set IMAGE"
}

arguments=(run --blood-type "$BLOOD_TYPE")
options=(
  --rm --read-only --cap-drop ALL --security-opt no-new-privileges --user "$(id -u):$(id -g)"
  --tmpfs "/tmp:rw,exec,mode=1777" --shm-size 1g
  --volume "${CACHE:-lora-trainer-cache}:/cache" --volume "${JOB:-lora-trainer-job}:/job"
  # After SIGTERM the job needs time for a checkpoint (checkpoints.grace_s is 90).
  --stop-timeout 120
)
[[ $device == cpu ]] && arguments+=(--config /opt/lora-trainer/examples/demo.yaml) || options+=(--gpus "${GPUS:-all}")
[[ ! -t 0 || ! -t 2 ]] || options+=(--interactive --tty)
[[ -z ${NETWORK:-} ]] || options+=(--network "$NETWORK")

place() { # OPTION URI MOUNTPOINT MODE: mount a folder; pass a URI on unchanged
  local folder=${2#file://}
  if [[ $folder == *://* ]]; then
    arguments+=("$1" "$2")
    return
  fi
  # Docker would create a missing folder as root.
  if [[ $4 == rw ]]; then [[ -n $dry_run ]] || mkdir -p "$folder"; else [[ -d $folder ]] || die "DATA=$2: no such folder"; fi
  options+=(--volume "$(realpath -m "$folder"):$3:$4")
  arguments+=("$1" "file://$3/")
}
place --data "${DATA:-data}" /data ro
place --output "${OUTPUT:-outputs}" /outputs rw

for name in $(compgen -e | grep -E '^(AWS_|LORA_TRAINER_|HF_TOKEN$|HF_HUB_OFFLINE$|HF_ENDPOINT$|WANDB_|MLFLOW_|OPENAI_API_KEY$|https?_proxy$|no_proxy$|HTTPS?_PROXY$|NO_PROXY$)'); do
  # These variables name files of this machine, which the container does not have.
  case $name in AWS_CA_BUNDLE | AWS_CONFIG_FILE | AWS_SHARED_CREDENTIALS_FILE | AWS_WEB_IDENTITY_TOKEN_FILE | LORA_TRAINER_CONFIG) continue ;; esac
  options+=(--env "$name")
done
read -r -a more <<<"${ARGS:-}"

if [[ -n $dry_run ]]; then
  {
    echo "# $image, from make $build; as $(id -u):$(id -g), read-only root, no capabilities"
    [[ $device == cpu ]] && echo "# no GPU: the tiny base in the image" || echo "# GPUs: ${GPUS:-all}; the job uses one, and ends with 5 if it sees more"
    echo "# data: ${DATA:-data}; adapters: ${OUTPUT:-outputs}; models and kernels: ${CACHE:-lora-trainer-cache}; scratch: ${JOB:-lora-trainer-job}"
    echo "# Ctrl-C or docker stop: a checkpoint, then 143; the same command continues from there"
  } >&2
  printf 'docker run'
  for word in "${options[@]}" --env IMAGE_DIGEST "$image" "${arguments[@]}" ${more[@]+"${more[@]}"}; do
    if [[ $word == IMAGE_DIGEST ]]; then
      printf " IMAGE_DIGEST=\"\$(docker image inspect --format '{{.Id}}' %s)\"" "$image"
    elif [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]]; then
      printf ' %s' "$word"
    else
      printf ' %q' "$word"
    fi
  done
  echo
  exit
fi
check
# The registry's digest, or the image's id if it was built here and never pushed.
digest=$("$DOCKER" image inspect --format '{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}{{.Id}}{{end}}' "$image")
exec "$DOCKER" run "${options[@]}" --env "IMAGE_DIGEST=$digest" "$image" "${arguments[@]}" ${more[@]+"${more[@]}"}
