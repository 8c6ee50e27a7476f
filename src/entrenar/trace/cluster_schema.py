"""The fields of section 4.4's JSON, checked: a profile that lacks one is refused, never read as "N/A"."""

from collections.abc import Mapping
from typing import Any

from entrenar.errors import FormatError

_NUMBER = (int, float)
_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "clusters": int,
    "silhouette_score": _NUMBER,
    "high_latency_cluster": dict,
    "outliers": list,
}
_CLUSTER_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "cluster_id": int,
    "avg_latency_us": _NUMBER,
    "syscalls": list,
    "count": int,
}
_OUTLIER_FIELDS: Mapping[str, type | tuple[type, ...]] = {"syscall": str, "latency_us": _NUMBER, "z_score": _NUMBER}


def checked(profile: Any) -> dict[str, Any]:
    """Return the `ml_analysis` of a profile, with every field of section 4.4 present and of its kind.

    Raises: FormatError that names every field that is missing or wrong, all at once.
    """
    faults: list[str] = []
    analysis = _object(profile, "ml_analysis", faults)
    if not faults:
        _check(analysis, "ml_analysis", _FIELDS, faults)
        _check(analysis.get("high_latency_cluster"), "ml_analysis.high_latency_cluster", _CLUSTER_FIELDS, faults)
        outliers = analysis.get("outliers")
        for index, outlier in enumerate(outliers if isinstance(outliers, list) else []):
            _check(outlier, f"ml_analysis.outliers[{index}]", _OUTLIER_FIELDS, faults)
    if faults:
        raise FormatError(
            f"a profile must have the fields of `entrenar trace clusters --format json`: {'; '.join(faults)}; "
            "write it again with --ml-anomaly --format json"
        )
    return analysis


def _object(profile: Any, name: str, faults: list[str]) -> dict[str, Any]:
    value = profile.get(name) if isinstance(profile, dict) else None
    if isinstance(value, dict):
        return value
    faults.append(f"{name} is missing" if value is None else f"{name} is {type(value).__name__}, not an object")
    return {}


def _check(value: Any, place: str, fields: Mapping[str, type | tuple[type, ...]], faults: list[str]) -> None:
    if not isinstance(value, dict):
        if value is not None:
            faults.append(f"{place} is {type(value).__name__}, not an object")
        return
    for name, kind in fields.items():
        if name not in value:
            faults.append(f"{place}.{name} is missing")
        elif not isinstance(value[name], kind) or isinstance(value[name], bool):
            faults.append(f"{place}.{name} is {value[name]!r}, of the wrong kind")
