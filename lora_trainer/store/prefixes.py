"""Where a run's objects lie under the output. SDS.md describes the layout."""

from __future__ import annotations

from lora_trainer.persona.vocabulary import BloodType


def run_prefix(blood_type: BloodType, run_id: str) -> str:
    """Where the output holds what an unfinished run needs."""
    return f"runs/{blood_type}/{run_id}/"


def lease_key(blood_type: BloodType, run_id: str) -> str:
    """The lease of a run, relative to the output."""
    return run_prefix(blood_type, run_id) + "lease.json"


def bundle_prefix(blood_type: BloodType, run_id: str) -> str:
    """Where a run's bundle lies under the output."""
    return f"adapters/{blood_type}/{run_id}/"


def latest_key(blood_type: BloodType) -> str:
    """The pointer to the newest accepted bundle."""
    return f"adapters/{blood_type}/latest.json"


def evaluation_prefix(prefix: str, gate_id: str) -> str:
    """Where a later evaluation of the bundle under `prefix` lies."""
    return f"{prefix}evaluations/{gate_id}/"
