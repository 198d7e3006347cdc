"""Keys and prefixes of a run's objects in the output. SDS.md describes the layout."""

from __future__ import annotations

from lora_trainer.persona.vocabulary import BloodType


def run_prefix(blood_type: BloodType, run_id: str) -> str:
    """Return the prefix of the objects that only an unfinished run needs: its lease and checkpoints."""
    return f"runs/{blood_type}/{run_id}/"


def lease_key(blood_type: BloodType, run_id: str) -> str:
    """Return the key of the run's lease."""
    return run_prefix(blood_type, run_id) + "lease.json"


def bundle_prefix(blood_type: BloodType, run_id: str) -> str:
    """Return the prefix of the run's bundle."""
    return f"adapters/{blood_type}/{run_id}/"


def latest_key(blood_type: BloodType) -> str:
    """Return the key of the pointer to the persona's newest accepted bundle."""
    return f"adapters/{blood_type}/latest.json"


def starts_key(blood_type: BloodType) -> str:
    """Return the key of the counter that numbers the starts of the persona's runs."""
    return f"runs/{blood_type}/starts.json"


def start_key(blood_type: BloodType, run_id: str) -> str:
    """Return the key of the record of the run's start."""
    return run_prefix(blood_type, run_id) + "start.json"


def sweep_prefix(blood_type: BloodType, sweep_id: str) -> str:
    """Return the prefix of a sweep's lease, record and page."""
    return f"runs/{blood_type}/sweeps/{sweep_id}/"


def bug_key(blood_type: BloodType, run_id: str | None, token: str) -> str:
    """Return the key of a bug's traceback: beside the run's checkpoints, or the persona's runs if the run had no id yet."""
    return f"{run_prefix(blood_type, run_id) if run_id else f'runs/{blood_type}/'}bug-{token}.txt"


def evaluation_prefix(prefix: str, gate_id: str) -> str:
    """Return the prefix of a later evaluation of the bundle at `prefix`."""
    return f"{prefix}evaluations/{gate_id}/"
