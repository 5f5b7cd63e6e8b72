"""Find the target of a scored proxy, and the optimizer state of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from iprox.errors import InputError, cut
from iprox.files import check_path
from iprox.models.checkpoint import proxy_description
from iprox.models.loading import load_config, model_fingerprint
from iprox.models.optimizer_state import load_adam_state
from iprox.session import Session
from iprox.settings import InfluenceSection


def query_target(model: str, given: str | None, settings: InfluenceSection, session: Session) -> str | None:
    """Return the target that a model's validation gradients are taken on; None if they are taken on the model itself.

    If the target of a proxy cannot be found, its own gradients are used, with a warning.

    Raises:
        InputError: a target is given for a model that is not a factorized proxy, or it is another proxy's target.
    """
    proxy = proxy_description(load_config(model, trust_remote_code=session.trust_remote_code), model)
    if proxy is None or not proxy.ranks:
        if given:
            raise InputError(f"--target {given}: {model} is not a low-rank proxy, so it has no target")
        return None
    if settings.query == "proxy" or not settings.traits.gradients:
        if given:
            without = f"--estimator {settings.estimator} takes no gradients"
            why = "influence.query proxy" if settings.traits.gradients else without
            raise InputError(f"--target {given}: has no effect with {why}; leave one of the two out")
        return None
    target = given or proxy.target
    try:
        loaded = _target_model(str(target), session, named=bool(given))
    except InputError as error:
        if given:
            raise
        session.reporter.warn(
            f"the target of {model} cannot be loaded ({error}), so validation gradients are taken on the proxy, which "
            "is less faithful; give --target"
        )
        return None
    if proxy.target_fingerprint not in (None, model_fingerprint(loaded)):
        raise InputError(
            f"{target}: is not the target of {model} (the weights differ); give the right "
            "--target, or --set influence.query=proxy"
        )
    return str(target)


def _target_model(target: str, session: Session, *, named: bool) -> PreTrainedModel:
    """Load the target of a proxy.

    If only the proxy's config names it, it must be a local folder: the author of a proxy must not choose what is
    downloaded.
    """
    if not named:
        printable = "".join(each if each.isprintable() else "?" for each in cut(target))
        check_path(target)
        if not Path(target).is_dir():
            raise InputError(f"there is no folder {printable} here; --target {printable} fetches it from the hub")
    with session.own_warnings():
        return session.model(target)


def warmed_folder(model: str, target: str | None, settings: InfluenceSection) -> str | None:
    """Return the folder with the optimizer's state, for the estimator `less`; None for other estimators.

    Raises:
        InputError: the folder has no optimizer state.
    """
    if not settings.traits.optimizer:
        return None
    load_adam_state(target or model)  # refused now rather than after the model is loaded
    return target or model
