"""Whether a run is sent to Weights & Biases, and whether there is a key for it. Imports no torch."""

import os
from collections.abc import Mapping
from contextlib import suppress
from netrc import NetrcParseError, netrc
from typing import Any
from urllib.parse import urlparse

from clbench.errors import UserError


def wandb_mode(settings: Mapping[str, Any]) -> tuple[str, str | None]:
    """The effective mode, `online`, `offline` or `disabled`, and why, in a line, where `wandb=auto` chose.

    Args:
        settings: the `wandb` group of the config.

    Raises:
        UserError: `online` without a key, or WANDB_BASE_URL is no address or holds a password.
    """
    chosen = settings["mode"]
    if chosen in ("auto", "online"):
        _check_address(os.environ.get("WANDB_BASE_URL"))
    if chosen == "auto":
        mode = os.environ.get("WANDB_MODE")
        if mode in ("online", "offline", "disabled"):
            chosen = mode
        elif wandb_key():
            return "online", "wandb=auto is online: a key is configured"
        else:
            return "offline", "wandb=auto is offline: no key is configured (WANDB_API_KEY, or wandb login)"
    if chosen == "online" and not wandb_key():
        raise UserError(
            "wandb=online needs a key: set WANDB_API_KEY or run wandb login; or take wandb=offline"
        )
    return chosen, None


def _check_address(address: str | None) -> None:
    """Check the address of a W&B server.

    Raises:
        UserError: it is no address, or holds a password.
    """
    if address is None:
        return
    try:
        parsed = urlparse(address)
        usable = parsed.scheme in ("http", "https") and bool(parsed.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"WANDB_BASE_URL={address} is no address of a server: give https://HOST, or unset it")
    if parsed.password:
        raise UserError(
            "WANDB_BASE_URL holds a password, which would end in logs: give the address without it, and the key "
            "in WANDB_API_KEY"
        )


def wandb_key() -> bool:
    """Whether a key for Weights & Biases is configured."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, ValueError, NetrcParseError):  # of a file that is not there, no text, or no netrc
        keys = netrc(os.environ.get("NETRC"))
        return bool(keys.hosts) and keys.authenticators(_server()) is not None
    return False


def _server() -> str:
    """The host that wandb sends to: which one where none is set differs between its versions."""
    address = os.environ.get("WANDB_BASE_URL")
    if address is None:
        import wandb  # takes a second, and only where there are keys of any host

        address = wandb.Settings().base_url
    return urlparse(address).hostname or ""
