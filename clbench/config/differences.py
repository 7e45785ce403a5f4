"""Which settings change the results of a run, and in which of them two configs differ."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from clbench import digests
from clbench.config.schema import BESIDE_SETTINGS, GONE
from clbench.errors import UserError
from clbench.metrics.names import IMAGE_RATE, PIXEL_RATE
from clbench.paths import absolute

# Settings that change where results go or how a run is watched, but not what they are; and what config.yaml holds
# beside the settings.
NOT_IN_RESULTS = (
    "experiment",
    "outputs",
    "cache",
    "maps",
    "overwrite",
    "only",
    "dry_run",
    "checkpoint_s",
    "evaluation_memory_mb",
    "sweep",
    "wandb",
    "hydra",
    *BESIDE_SETTINGS,
)
# Settings that runs of earlier versions do not have: flat key -> what they were made with.
_LATER: Mapping[str, Any] = {
    "dataset.added": {},
    "dataset.absent": {},
    "stream.kind": "tasks",
    "metrics.further": [],
    "metrics.pixel_rate": PIXEL_RATE,
    "metrics.image_rate": IMAGE_RATE,
}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings that change results and differ between two plain configs, as `key: old -> new`.

    A setting that is null and one that is not there are the same, and so is one of a later version that was left as it
    is: runs of a version that did not have it yet. What is no setting any more changes nothing but rounding.
    """
    before, after = map(_deciding, (old, new))
    return [
        f"{key}: {before.get(key, 'null')} -> {after.get(key, 'null')}"
        for key in sorted({*before, *after})
        if not same(before.get(key, "null"), after.get(key, "null"))
    ]


def settings_digest(config: Mapping[str, Any]) -> str:
    """The digest of the settings of a plain config that change results: those of two are one where nothing differs."""
    given = {key: value for key, value in _deciding(config).items() if value is not None}
    return digests.of_text(json.dumps(given, sort_keys=True, default=str))


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change results: flat key -> value; without those of later versions that were left as they are."""
    return {
        key: value
        for key, value in flat(config)
        if key.split(".")[0] not in NOT_IN_RESULTS and key not in GONE and value != _LATER.get(key)
    }


def same(before: Any, after: Any) -> bool:
    """Whether two values of a setting are one: equal, or a path as it is typed and as config.yaml keeps it.

    Args:
        before: of a file in conf/, or of a config.yaml of an earlier version, which kept paths as they were typed.
        after: of a checked config.
    """
    if before == after or not (isinstance(before, str) and isinstance(after, str) and os.path.isabs(after)):
        return before == after
    with suppress(UserError):
        return absolute(before) == after
    return False


def flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The values of a config with their flat keys, such as `gpu.threads`, in their order.

    Args:
        prefix: what every key begins with.
    """
    pairs: list[tuple[str, Any]] = []
    for key, value in node.items():
        if isinstance(value, dict) and value:
            pairs += flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def in_results(override: str) -> bool:
    """Whether an override, such as `gpu.threads=2`, can change a run's results."""
    return re.split(r"[.=/@]", override.lstrip("+~"), maxsplit=1)[0] not in NOT_IN_RESULTS
