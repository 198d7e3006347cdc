"""Render the chart's examples (charts/persona-train/ci) to plain manifests in k8s/rendered, for users without Helm.

    python tools/k8s_rendered.py --write    write k8s/rendered
    python tools/k8s_rendered.py --check    exit 1 if something there is out of date

Uses Helm 4 as a library (locks/chart.txt) and the newest Kubernetes version it knows, so the manifests contain the failure
policy and need Kubernetes 1.29 or newer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import helm_python
import yaml

ROOT: Final = Path(__file__).resolve().parent.parent
CHART: Final = ROOT / "charts" / "persona-train"
RENDERED: Final = ROOT / "k8s" / "rendered"
RELEASE: Final = "persona-train"
NAMESPACE: Final = "personas"
# objects that others depend on come first
_ORDER: Final = ("networkpolicy.yaml", "serviceaccount.yaml", "configmap.yaml", "pvc.yaml", "cronjob.yaml", "job.yaml")
_HEAD: Final = """\
# Rendered from charts/persona-train/ci/{name} by `make k8s-rendered`: change that and not this.
# kubectl apply -f k8s/rendered/{target}
"""


def rendered(chart: Any, path: Path) -> str:
    """Return the manifests of one example, without the notes and the pod of `helm test`."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    by_file = {
        file.removeprefix("persona-train/templates/"): text
        for file, text in chart.render(values, name=RELEASE, namespace=NAMESPACE).items()
    }
    kept = {file: text for file, text in by_file.items() if file.endswith(".yaml") and not file.startswith("tests/")}
    if unknown := set(kept) - set(_ORDER):
        raise ValueError(f"templates whose place among the others is not known: {', '.join(sorted(unknown))}")
    documents = [text.strip().removeprefix("---").strip() for file in _ORDER if (text := kept.get(file, "")).strip()]
    return _HEAD.format(name=path.name, target=target(path).name) + "".join(f"---\n{text}\n" for text in documents)


def target(path: Path) -> Path:
    """Return the path of an example's manifests."""
    return RENDERED / f"{path.name.removesuffix('-values.yaml')}.yaml"


def main() -> int:
    """Write or check the manifests. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write k8s/rendered")
    mode.add_argument("--check", action="store_true", help="say which file is out of date")
    arguments = parser.parse_args()
    chart = helm_python.Chart.load(str(CHART))
    wanted = {target(path): rendered(chart, path) for path in sorted((CHART / "ci").glob("*-values.yaml"))}
    outdated = 0
    for path, text in wanted.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        outdated += 1
        if arguments.write:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'written' if arguments.write else 'out of date; run make k8s-rendered'}")
    for path in sorted(set(RENDERED.glob("*")) - set(wanted)):
        outdated += 1
        if arguments.write:
            path.unlink()
        print(f"{path.relative_to(ROOT)}: {'removed' if arguments.write else 'is rendered from nothing; run make k8s-rendered'}")
    return 1 if outdated and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
