"""From the name of a model to the directory that holds it.

A name is looked for as a directory, among the models that come with the package, in the local Hugging
Face cache and, last, on the hub, from where it is downloaded into that cache. ``huggingface_hub`` is
imported only for a download: a model that is at hand opens without it.

Environment variables are read at each call: ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_TOKEN``,
``HF_HUB_CACHE``, ``HF_HOME``, as ``huggingface_hub`` understands them.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import re
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from .errors import ModelLoadError

BUILT_IN = "nnsight-go/"
"""Prefix of the names of the models that come with the package."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER = "tokenizer.json"

# Everything beside the weights that anything here, or transformers reading the same directory, uses.
_SMALL = [
    "config.json",
    "generation_config.json",
    _TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
]

_REPO = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(
    name: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = True,
    weights: bool = True,
) -> Path:
    """Finds the directory of a model, downloading it if need be.

    A model that is whole in the cache is taken from there without asking the hub for a newer one;
    ``hf download`` or another ``revision`` fetches that.

    Args:
        name: a directory; ``"nnsight-go/landmarks"``; or a model of the hub, ``"openai-community/gpt2"``.
        revision: branch, tag or whole commit hash of a model of the hub; by default ``"main"``.
        token: for private and gated models: a token, ``True`` for the one that ``hf auth login`` keeps
            (also taken where ``None``), ``False`` for none.
        cache_dir: root of the cache, instead of Hugging Face's own.
        local_files_only: never download.
        progress: show a progress bar while downloading.
        weights: False for a model that is computed elsewhere, of which the small files do.

    Returns:
        The directory, which holds ``config.json`` unless the caller named a directory without one.

    Raises:
        ModelLoadError: there is no such model, or it cannot be had; says which and what to do.
    """
    text = os.fspath(name)
    directory = Path(text).expanduser()
    if text and directory.is_dir():
        return directory
    if text in built_in_models():
        return _built_in_root() / text.removeprefix(BUILT_IN)
    if not isinstance(name, str) or _is_path(text):
        _no_directory(text, directory)
    if not _REPO.fullmatch(text) or ".." in text or "--" in text:
        raise ModelLoadError(
            f"{text!r} is neither a directory nor the name of a model",
            hint=f'Names look like "openai-community/gpt2".{_nearest(text)}',
        )
    if revision is not None and (not revision or ".." in revision or revision.startswith("/")):
        raise ModelLoadError(f"{revision!r} cannot be a revision", hint="Give a branch, a tag or a commit hash.")
    if text.startswith(BUILT_IN):
        raise ModelLoadError(
            f"no model {text!r} comes with this package", hint=f"It brings {_join(built_in_models()) or 'none'}."
        )
    root = Path(cache_dir).expanduser() if cache_dir is not None else cache_root()
    found = _cached(root, text, revision)
    if found is not None and (_is_whole(found) if weights else _is_described(found)):
        return found
    if local_files_only or _offline():
        if found is not None and (_has_weights(found) if weights else (found / "config.json").exists()):
            return found
        _not_cached(text, revision, root, found, local_files_only)
    return _Download(text, revision, token, root, progress, found, weights).run()


def built_in_models() -> list[str]:
    """Names of the models that come with the package."""
    root = _built_in_root()
    return sorted(BUILT_IN + d.name for d in root.iterdir() if d.is_dir()) if root.is_dir() else []


def cache_root() -> Path:
    """Root of the local Hugging Face cache, as ``huggingface_hub`` finds it, from today's environment."""
    environ = os.environ
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := environ.get(variable):
            return _expand(value)
    if value := environ.get("HF_HOME"):
        return _expand(value) / "hub"
    return _expand(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _expand(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path)))


def _built_in_root() -> Path:
    return Path(__file__).parent / "models"


def _offline() -> bool:
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def _is_path(text: str) -> bool:
    """Whether a name can only be meant as a directory."""
    return (
        text in (".", "..")
        or text.startswith(("./", "../", "~"))
        or text.endswith("/")
        or os.path.isabs(text)
        or text.count("/") > 1
        or (os.sep != "/" and os.sep in text)
    )


def _no_directory(text: str, directory: Path) -> NoReturn:
    if directory.exists():
        raise ModelLoadError(
            f"{text} is a file, not a model's directory", hint="Give the directory that the file stands in."
        )
    beside = sorted(d.name for d in directory.parent.iterdir() if d.is_dir()) if directory.parent.is_dir() else []
    near = difflib.get_close_matches(directory.name, beside, n=3)
    hint = f"Nearest in {directory.parent}: {_join(near)}." if near else "Check its name."
    raise ModelLoadError(f"the directory {text} does not exist", hint=hint)


def _nearest(text: str) -> str:
    """A sentence that offers the built-in models whose names are near."""
    names = {name.removeprefix(BUILT_IN): name for name in built_in_models()}
    near = difflib.get_close_matches(text.rpartition("/")[2], names, n=3)
    return f" Did you mean {_join(names[n] for n in near)}?" if near else ""


def _join(names: Iterable[str]) -> str:
    return ", ".join(names)


# ---- the cache ----


def _repository(root: Path, name: str) -> Path:
    return root / ("models--" + name.replace("/", "--"))


def _cached(root: Path, name: str, revision: str | None) -> Path | None:
    """The snapshot of a model in the cache, whole or not."""
    repository = _repository(root, name)
    commit = revision or "main"
    with contextlib.suppress(OSError, UnicodeDecodeError):  # a commit hash has no ref
        commit = (repository / "refs" / commit).read_text().strip()
    directory = repository / "snapshots" / commit
    return directory if _COMMIT.fullmatch(commit) and directory.is_dir() else None


def _is_whole(snapshot: Path) -> bool:
    """Whether a snapshot has all that a download would bring: an earlier one may have been interrupted,
    or have fetched only part (only the weights, say)."""
    if not _has_weights(snapshot):
        return False
    if (snapshot / _TOKENIZER).exists():
        return True
    listing = snapshot.parent.parent / "trees" / f"{snapshot.name}.json"  # written by huggingface_hub 2
    try:
        files = json.loads(listing.read_text())["files"]
        return _TOKENIZER not in files
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_described(snapshot: Path) -> bool:
    """Whether a snapshot has what it takes to write traces."""
    return (snapshot / "config.json").exists() and (snapshot / _TOKENIZER).exists()


def _has_weights(snapshot: Path) -> bool:
    if not (snapshot / "config.json").exists():
        return False
    if (snapshot / _SINGLE).exists():
        return True
    shards = _shards(snapshot)
    return bool(shards) and all((snapshot / s).exists() for s in shards)


def _shards(snapshot: Path) -> list[str]:
    """File names that the index of a snapshot names; none where there is no readable index."""
    try:
        places = json.loads((snapshot / _INDEX).read_text())["weight_map"].values()
        # a name with a path in it is for the engine to refuse
        return sorted({p for p in places if isinstance(p, str) and p == os.path.basename(p)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _not_cached(name: str, revision: str | None, root: Path, found: Path | None, local_files_only: bool) -> NoReturn:
    why = "local_files_only is set" if local_files_only else "HF_HUB_OFFLINE is set"
    fetch = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    what = f"{name}{_at(revision)}"
    if found is not None:
        message = f"{what} is in the local cache only in part ({found}), and {why}"
    else:
        message = f"{what} is not in the local cache ({root}), and {why}"
    raise ModelLoadError(
        message, hint=f"Download it while online, with {fetch}, or allow the download.{_nearest(name)}"
    )


def _at(revision: str | None) -> str:
    return f" (revision {revision})" if revision else ""


# ---- the hub ----


class _Download:
    """One model on its way from the hub into the cache."""

    def __init__(
        self,
        name: str,
        revision: str | None,
        token: str | bool | None,
        root: Path,
        progress: bool,
        found: Path | None,
        weights: bool,
    ) -> None:
        self.name = name
        self.revision = revision
        self.token = token
        self.root = root
        self.progress = progress
        self.found = found
        self.weights = weights
        # its own constant is fixed at import
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    def run(self) -> Path:
        """Downloads and gives the snapshot. What the cache already holds is not downloaded again, and
        a download that breaks off leaves nothing behind that a second one could take for whole."""
        try:
            from huggingface_hub import errors
        except ImportError as error:
            raise ModelLoadError(
                f"{self.name} is not on this machine, and downloading it needs huggingface_hub",
                hint="Install it with: pip install huggingface_hub",
            ) from error
        try:
            address = urllib.parse.urlsplit(self.endpoint)
            usable = address.scheme in ("http", "https") and bool(address.hostname) and (address.port or 1) > 0
        except ValueError:
            usable = False
        if not usable:
            raise ModelLoadError(
                f"HF_ENDPOINT is {self.endpoint!r}, which is no address", hint="Unset it, or give https://and.a.host"
            )
        # the library's own errors, among them the base of its HTTP library's, and the system's
        theirs = (e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception))
        kinds: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *theirs)
        try:
            return self._fetch()
        except ModelLoadError:
            raise
        except kinds as error:
            if self.found is not None and _has_weights(self.found):
                return self.found  # all but the tokenizer is here, and the hub does not give more
            raise self._explain(error) from error

    def _fetch(self) -> Path:
        snapshot = self._snapshot([*_SMALL, *([_SINGLE, _INDEX] if self.weights else [])], self.revision)
        if self.weights and not (snapshot / _SINGLE).exists():
            missing = [s for s in _shards(snapshot) if not (snapshot / s).exists()]
            if missing:
                self._snapshot(missing, snapshot.name)
        if not (snapshot / "config.json").exists():
            raise ModelLoadError(
                f"{self._what} holds no config.json, so it is not a transformers model",
                hint=f"It holds {self._files(snapshot)}. See {self._page}.",
            )
        if self.weights and not _has_weights(snapshot):
            raise ModelLoadError(
                f"{self._what} holds no whole safetensors weights", hint=self._why_no_weights(snapshot)
            )
        return snapshot

    def _snapshot(self, files: list[str], revision: str | None) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self.name,
                revision=revision,
                token=self.token,
                cache_dir=self.root,
                allow_patterns=files,  # names without * mean exactly these: nothing of onnx/, no .bin
                endpoint=self.endpoint,
                library_name="nnsight-go",
                tqdm_class=None if self.progress else _silent(),
            )
        )

    @property
    def _what(self) -> str:
        return f"{self.name}{_at(self.revision)}"

    @property
    def _page(self) -> str:
        return f"{self.endpoint}/{self.name}"

    def _listing(self, snapshot: Path) -> list[str]:
        """All files of the repository, as the download listed them."""
        try:
            return sorted(json.loads((snapshot.parent.parent / "trees" / f"{snapshot.name}.json").read_text())["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _files(self, snapshot: Path) -> str:
        files = self._listing(snapshot)
        return _join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "") or "nothing"

    def _why_no_weights(self, snapshot: Path) -> str:
        if shards := [s for s in _shards(snapshot) if not (snapshot / s).exists()]:
            return f"{_INDEX} names {shards[0]}, which the repository does not have. Tell its owner: {self._page}."
        files = self._listing(snapshot)
        if any(f.endswith(".bin") and "/" not in f for f in files):
            return (
                "It holds pickles (.bin), which are not read because reading one can run anybody's code. Convert it "
                "once with transformers: AutoModelForCausalLM.from_pretrained(name).save_pretrained(directory), and "
                "open that directory."
            )
        return f"It holds {self._files(snapshot)}. See {self._page}."

    def _explain(self, error: BaseException) -> ModelLoadError:
        """The error that says what to do, for one of huggingface_hub's."""
        from huggingface_hub import errors

        # what the hub answered says more than what was made of it
        error = _beneath(error, errors.HfHubHTTPError) or error
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        log_in = "pass token=, set HF_TOKEN, or log in once with: hf auth login"
        if isinstance(error, errors.GatedRepoError):  # a RepositoryNotFoundError too
            return ModelLoadError(
                f"{self.name} is gated: its owner asks you to accept conditions first",
                hint=f"Accept them at {self._page}, then {log_in}.",
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            known = "your token does not reach it" if self._has_token() else "it is private"
            return ModelLoadError(
                f"there is no model {self.name} on {self.endpoint}, or {known}",
                hint=f"Check the name. If the model is private, {log_in}.{_nearest(self.name)}",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return ModelLoadError(
                f"{self.name} has no revision {self.revision or 'main'}",
                hint=f"Branches, tags and commits stand at {self._page}/tree/main.",
            )
        if isinstance(error, errors.DisabledRepoError):
            return ModelLoadError(f"{self.name} has been disabled on {self.endpoint}", hint=f"See {self._page}.")
        if isinstance(error, errors.HFValidationError):
            return ModelLoadError(f"{self.name!r} is not the name of a model", cause=_first_line(error))
        if status in (401, 403):
            return ModelLoadError(
                f"{self.endpoint} refused to give {self.name} (status {status})",
                hint=f"The token may be wrong, out of date or lack the right to read: {log_in}.",
                cause=_first_line(error),
            )
        if status is not None:
            return ModelLoadError(
                f"{self.endpoint} failed to give {self.name} (status {status})",
                hint="Try again later.",
                cause=_first_line(error),
            )
        if _beneath(error, errors.OfflineModeIsEnabled):
            return ModelLoadError(
                f"{self._what} is not in the local cache ({self.root}), and huggingface_hub was imported offline",
                hint="Start Python without HF_HUB_OFFLINE, or download the model in another process.",
            )
        # the base of its HTTP library's errors; those that carry no response are the network's
        if network := _beneath(error, vars(errors)["HTTPError"]):
            return ModelLoadError(
                f"{self._what} is not in the local cache, and {self.endpoint} cannot be reached or broke off",
                hint="Check the network, the proxy and HF_ENDPOINT, then try again. A model that was downloaded before "
                f"(hf download {self.name}) needs no network.",
                cause=f"{type(network).__name__}: {_first_line(network)}",
            )
        if getattr(error, "errno", None) is not None:  # the disk's own
            return ModelLoadError(
                f"{self.name} cannot be written to the cache ({self.root})",
                hint="Another place can be given with HF_HUB_CACHE or cache_dir=.",
                cause=str(error),
            )
        return ModelLoadError(
            f"the download of {self._what} broke off",
            hint="Try again: what has arrived whole is not fetched again.",
            cause=_first_line(error),
        )

    def _has_token(self) -> bool:
        from huggingface_hub import get_token

        return self.token is not False and bool(self.token or get_token())


def _silent() -> type[Any]:
    """A progress bar that shows nothing."""
    module: Any = importlib.import_module("huggingface_hub.utils.tqdm")  # the package's name is the class's too
    bar = module.tqdm
    return type("Silent", (bar,), {"__init__": lambda self, *a, **k: bar.__init__(self, *a, **{**k, "disable": True})})


def _beneath(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The nearest error of a kind in a chain of causes."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
