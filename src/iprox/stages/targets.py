"""Where the validation gradients and the optimizer's state of a scored model come from."""

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
    """Where the validation gradients of a scored model are taken: the target, given or named by a proxy; None: on it.

    A proxy whose target is not to be found is scored with its own, and that is said.

    Raises:
        InputError: --target with a model that is no factorized proxy, or the target is not the proxy's.
    """
    proxy = proxy_description(load_config(model, trust_remote_code=session.trust_remote_code), model)
    if proxy is None or not proxy.ranks:
        if given:
            raise InputError(f"--target {given}: goes with a low-rank proxy, which {model} is not")
        return None
    if settings.query == "proxy" or not settings.traits.gradients:
        if given:
            without = f"--estimator {settings.estimator} takes no gradients"
            why = "influence.query proxy" if settings.traits.gradients else without
            raise InputError(f"--target {given}: is not used with {why}; leave one of the two out")
        return None
    target = given or proxy.target
    try:
        loaded = _target_model(str(target), session, named=bool(given))
    except InputError as error:
        if given:
            raise
        session.reporter.warn(
            f"the target of {model} cannot be read ({error}); validation gradients are taken on the proxy, which is "
            "less faithful: give --target"
        )
        return None
    if proxy.target_fingerprint not in (None, model_fingerprint(loaded)):
        raise InputError(
            f"{target}: is not the target of {model} (the weights differ); give the right "
            "--target, or --set influence.query=proxy"
        )
    return str(target)


def _target_model(target: str, session: Session, *, named: bool) -> PreTrainedModel:
    """The target of a proxy, loaded.

    What only the proxy's config names is read if it is a folder here: whoever wrote the proxy does not choose what is
    fetched from the hub.

    Raises:
        InputError: it is none, or cannot be loaded.
    """
    if not named:
        printable = "".join(each if each.isprintable() else "?" for each in cut(target))
        check_path(target)
        if not Path(target).is_dir():
            raise InputError(f"there is no folder {printable} here; --target {printable} fetches it from the hub")
    with session.own_warnings():
        return session.model(target)


def warmed_folder(model: str, target: str | None, settings: InfluenceSection) -> str | None:
    """The folder that holds the optimizer's state, for the estimator `less`.

    Raises:
        InputError: it holds none.
    """
    if not settings.traits.optimizer:
        return None
    load_adam_state(target or model)  # refused now rather than after the model is loaded
    return target or model
