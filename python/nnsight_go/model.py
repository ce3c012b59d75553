"""Language models: opening them, and tracing them."""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch

from . import _ffi, envoy, foreign, hub, positions, renaming, tracebacks
from . import remote as remotely
from .continuation import Continuation
from .edits import Editable, Editing, EditRecorder
from .envoy import Envoy
from .errors import InputError, ModelLoadError, NnsightError
from .generating import Generating, Generator
from .native import Native
from .positions import here
from .runners import Runner
from .scanning import ScanRecorder
from .sessions import Session
from .streaming import TextStream
from .tokenizer import Tokenizer
from .tracing import Tracer

# Where a family's config has names of its own for what the others call so.
_GRAPHS = 8  # that cuda_graphs=True keeps

_SYNONYMS = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
}


class Config(dict[str, Any]):
    """The model's ``config.json``; its entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[_SYNONYMS.get(self.get("model_type", ""), {}).get(name, name)]
        except KeyError:
            raise AttributeError(f"the model's config has no {name!r}") from None

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of it."""
        return dict(self)


class LanguageModel(Envoy, Editable):
    """A language model whose insides can be read and changed while it runs.

    ::

        model = LanguageModel("openai-community/gpt2", device_map="auto", dispatch=True)
        with model.trace("The Eiffel Tower is in the city of"):
            hidden = model.transformer.h[5].output[0].save()
        print(hidden.shape)

    Modules are attributes, under the names of Hugging Face's implementation.

    Args:
        name: a directory; ``"nnsight-go/landmarks"``, the model that comes with the package; or the
            name of a model of the Hugging Face hub, which is looked for in the local cache and else
            downloaded. Or a model of transformers, which is wrapped as it is.
        device_map: where the model computes: ``"auto"`` (the GPU if there is one), ``"cpu"``,
            ``"cuda"``, ``"cuda:1"``, a ``torch.device``, or None for the CPU.
        dtype: dtype of the parameters, a ``torch.dtype`` or its name; None or ``"auto"`` keeps what the
            checkpoint holds. ``torch_dtype`` is another name of it.
        dispatch: map the weights now, rather than at the first trace.
        tokenizer: a tokenizer (anything that gives ``tokenizer(text)["input_ids"]``), a directory or
            name to take one from, or False for none. By default the model's own.
        revision: branch, tag or commit of a model of the hub.
        token: for private and gated models of the hub: a token, or True for the one that is stored.
        cache_dir: root of the Hugging Face cache.
        local_files_only: never download.
        rename: more names for modules: ``{"transformer.h": "layers"}`` makes ``model.layers``, and
            ``{"attn": "attention"}`` gives every module named so a second name.
        native: False has transformers compute the model, though the engine could; True refuses a model that the
            engine cannot. By default the engine does what it can, and transformers the rest.
        prepack: weights that long prompts use again and again on the CPU get a copy in a layout that multiplies faster:
            True for up to 2 GiB of copies, a number for so many bytes, False for none.
        cuda_graphs: on a GPU, traces that are written alike are done by the CUDA graph of an earlier one: True for
            up to 8 graphs, a number for so many. See ``docs/devices.md``.
        remote: where the model's traces run unless they say otherwise, as ``trace`` takes it. With a server, no
            weights are looked for or downloaded here, and the model runs nowhere else; where its config is not to be
            had either, the server tells what it is, and prompts are token ids.
        options: what programs written for nnsight give: taken where it changes nothing here
            (``trust_remote_code``, ``task="text-generation"``, ...).

    Raises:
        ModelLoadError: there is no such model, it cannot be had, a file of it is missing or spoilt, or
            its architecture is not one that the engine knows.
        InputError: an argument cannot be used.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> LanguageModel:
        """Readies what every model needs, once a process, and chooses who computes it."""
        tracebacks.install()
        if cls is not LanguageModel or not args:
            return super().__new__(cls)
        hosted, directory = _is_hosted(args[0], kwargs)
        if hosted:
            from .hosted_language import HostedLanguageModel

            cls = HostedLanguageModel
        model = super().__new__(cls)
        model.__dict__["_found"] = directory
        return model

    _remote: bool | str | None = None  # where traces run unless they say otherwise

    def _locate(self, name: Any, *where: Any) -> Path:
        """The directory of a model, which is looked for once."""
        if remotely.is_server(self._remote):
            self._described = remotely.Described(name, self._remote, *where)  # which lives as long
            return self._described.path
        return self.__dict__.pop("_found", None) or hub.resolve(name, *where)

    def __init__(
        self,
        name: str | os.PathLike[str],
        *,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        dtype: torch.dtype | str | None = None,
        dispatch: bool = False,
        tokenizer: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        rename: Mapping[str, str | list[str]] | None = None,
        torch_dtype: torch.dtype | str | None = None,
        native: bool | None = None,
        prepack: bool | int = True,
        cuda_graphs: bool | int = False,
        remote: bool | str | None = None,
        **options: Any,
    ) -> None:
        foreign.options("LanguageModel(...)", options, foreign.OPENING)
        if options:
            raise TypeError(f"LanguageModel does not take {', '.join(sorted(options))}")
        if not isinstance(name, str | os.PathLike):
            raise InputError(
                f"a model is opened by its name or directory, not by a {type(name).__name__}",
                hint="Save it with save_pretrained(directory), and open that directory.",
                **positions.fields(here()),
            )
        self._remote, bare = remote, remotely.is_server(remote)
        directory = self._locate(name, revision, token, cache_dir, local_files_only)
        given = dtype if dtype is not None else torch_dtype
        of = _dtype(remotely.dtype(directory) if bare and given in (None, "auto") else given)
        engine = Native(
            directory,
            of,
            _device(device_map),
            dispatch,
            prepack,
            bare,
            _GRAPHS if cuda_graphs is True else int(cuda_graphs),
        )
        super().__init__(engine, "", engine.description["modules"][0])
        self._directory = directory
        self._name_or_path = os.fspath(name)
        self._tokenizer_given = tokenizer
        self._tokenizer_lock = threading.Lock()
        self._tokenizer: Any = None
        envoy.grow(self, engine.description["modules"])
        self._rename = dict(rename or {})
        renaming.apply(self, self._rename)

    # ---- tracing ----

    @overload
    def trace(
        self,
        *inputs: Any,
        remote: bool | str | None = ...,
        blocking: bool = ...,
        trace: Literal[True] = ...,
        **kwargs: Any,
    ) -> Tracer: ...

    @overload
    def trace(
        self,
        *inputs: Any,
        remote: bool | str | None = ...,
        blocking: bool = ...,
        trace: Literal[False],
        **kwargs: Any,
    ) -> Any: ...

    def trace(
        self,
        *inputs: Any,
        remote: bool | str | None = None,
        blocking: bool = True,
        trace: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Begins a trace: ``with model.trace("Hello"):``, or ``with model.trace() as tracer:`` for invokes.

        Args:
            inputs: one input: a text, a list of texts, token ids (a list, a list of lists, or an integer
                tensor ``[seq]`` or ``[batch, seq]``), or what a tokenizer gives. A list of rows of
                different lengths is padded on the left.
            remote: where it runs: True on the server of ``CONFIG.API.HOST``, ``"https://..."`` on another one,
                ``"local"`` in this process, but with everything written and read that would travel. A server has
                weights of its own: those here are not used.
            blocking: False leaves a remote trace with the server when the block ends: ``tracer.job``.
            trace: False runs the model at once, and returns what it gives.
            kwargs: the same by name, ``input_ids=`` and ``attention_mask=``; how text is tokenized,
                ``add_special_tokens=``, ``truncation=`` and ``max_length=``.

        Raises:
            InputError: the input cannot be used.
        """
        runner = self._runner(remote, blocking)
        foreign.options("a trace", kwargs, foreign.TRACE)
        tracer = Tracer(self, inputs, kwargs, runner=runner)
        if trace:
            return tracer
        with tracer:
            out = self.output.save()
        return out

    def _runner(self, remote: bool | str | None, blocking: bool = True) -> Runner | None:
        """What runs a trace: None for the engine here."""
        return remotely.runner(self, remote, blocking)

    @property
    def share_tokens(self) -> bool:
        """Whether tokens that are equal in several rows are computed once, and those that nobody looks at never.

        On from the start, and off only for comparison: what a trace gives is the same. ``tracer.explain()`` shows
        what comes of it.
        """
        return self._native.shares

    @share_tokens.setter
    def share_tokens(self, on: bool) -> None:
        self._native.share(on)

    def generate(
        self, *inputs: Any, remote: bool | str | None = None, blocking: bool = True, **settings: Any
    ) -> Generating:
        """Generates text, with every step open: ``with model.generate("Hello", max_new_tokens=5) as tracer:``.

        Args:
            inputs: as ``trace`` takes them; a list of prompts is padded on the left.
            remote: as ``trace`` takes it.
            blocking: False leaves a remote generation with the server when the block ends: ``tracer.job``.
            settings: as in transformers: ``max_new_tokens`` (or ``max_length``), ``min_new_tokens``,
                ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``typical_p``,
                ``repetition_penalty``, ``no_repeat_ngram_size``, ``eos_token_id``, ``pad_token_id``. Those not
                given are the model's ``generation_config.json``'s. Sampling draws from torch's generator.
                ``num_beams`` searches with so many beams, rows of their prompt side by side at each step
                (``length_penalty``, ``early_stopping``; not with ``do_sample``). ``num_return_sequences`` gives so
                many sampled rows of each prompt, side by side, or so many of its beams. ``stop_strings`` end
                rows, and so do ``stopping_criteria``: functions ``(input_ids, scores)`` that give True, or a tensor
                of it a row. ``logits_processor`` are functions ``(input_ids, scores)`` that give scores.
                ``streamer`` has ``put(tokens)``, called with the prompts and then each step's tokens, and
                ``end()``. ``output_scores=True`` fills ``tracer.scores``.

        Raises:
            InputError: the input or a setting cannot be used, or there is no room for so many tokens.
        """
        return Generating(self, inputs, settings, self._runner(remote, blocking))

    def _inputs_of(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Takes the inputs by name out of what ``generate`` was given."""
        return {k: settings.pop(k) for k in ("input_ids", "attention_mask") if k in settings}

    def _continue(
        self,
        args: tuple[Any, ...],
        by_name: dict[str, Any],
        settings: dict[str, Any],
        runner: Runner | None = None,
    ) -> Continuation:
        return Continuation(self, args, by_name, settings, runner)

    def stream(self, *inputs: Any, remote: bool | str | None = None, **settings: Any) -> TextStream:
        """Writes text behind a prompt, in pieces: ``for piece in model.stream("Once", max_new_tokens=50):``.

        A piece is what became certain, at least one character. Closing the stream frees the generation.

        Args:
            inputs: one prompt.
            settings: as ``generate`` takes them, and ``skip_special_tokens``, True unless given.

        Raises:
            InputError: the input or a setting cannot be used, or there is no room for so many tokens.
        """
        return TextStream(self, inputs, settings, self._runner(remote))

    @property
    def generator(self) -> Generator:
        """What the generation that goes on gives: ``model.generator.output``."""
        return Generator()

    def scan(self, *inputs: Any, **kwargs: Any) -> Tracer:
        """A trace that computes nothing: shapes and dtypes are known, saved values are tensors on the meta device.

        Needs no weights. Takes what ``trace`` takes.

        Raises:
            OpError: at the end of the block, where an operation's shapes do not fit.
        """
        foreign.options("a scan", kwargs, foreign.TRACE)
        return Tracer(self, inputs, kwargs, ScanRecorder)

    def session(self, remote: bool | str | None = None, blocking: bool = True, **kwargs: Any) -> Session:
        """Several traces in which values flow from one to the next without being saved.

        Those that run elsewhere are one job, done at the end, or when a line needs one of their values.

        ::

            with model.session():
                with model.trace("Hello"):
                    h = model.transformer.h[5].output[0]
                with model.trace("World"):
                    model.transformer.h[5].output[0][:, -1] = h[:, -1]
                    logits = model.lm_head.output.save()

        Args:
            remote: where its traces run: see ``trace``.
            blocking: wait for the values of traces that run elsewhere. Without, ``session.job`` is their job.
            kwargs: options of other tools, which have no meaning here.
        """
        foreign.options("a session", kwargs, foreign.TRACE)
        if kwargs:
            raise TypeError(f"a session does not take {', '.join(sorted(kwargs))}")
        return Session(remote, blocking)

    def edit(self, inplace: bool = False) -> Editing[Self]:
        """Records interventions that every later trace brings along: ``with model.edit() as edited:``.

        The block is as that of a trace, but has no input: it names no sizes of batch or sequence, needs
        no values and saves nothing. In a trace of the edited model each invoke has the edits made on its
        rows, ahead of its own lines.

        Args:
            inplace: edit this model, rather than give an edited view of it that shares its weights.
        """
        return Editing(self, inplace, lambda: EditRecorder(self._native))

    def _view(self) -> LanguageModel:
        view = LanguageModel.__new__(type(self))
        Envoy.__init__(view, self._native, "", self._native.description["modules"][0])
        names = "_directory _name_or_path _remote _tokenizer_given _tokenizer_lock _tokenizer _edits"
        for name in names.split():
            setattr(view, name, getattr(self, name))
        envoy.grow(view, self._native.description["modules"])
        view._rename = self._rename
        renaming.apply(view, self._rename)
        return view

    # ---- what belongs to the model ----

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, opened when it is first asked for; None where the model was opened without one."""
        if self._tokenizer_given is False:
            return None
        if self._tokenizer is None:
            with self._tokenizer_lock:
                if self._tokenizer is None:
                    self._tokenizer = self._open_tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer_given = False if value is None else value
        self._tokenizer = None

    def _open_tokenizer(self) -> Any:
        given = self._tokenizer_given
        if given is None or given is True:
            return Tokenizer(self._directory, name_or_path=self._name_or_path)
        if isinstance(given, str | os.PathLike):
            return Tokenizer(hub.resolve(given), name_or_path=os.fspath(given))
        if not callable(given):
            raise InputError(
                f"a {type(given).__name__} cannot be a tokenizer",
                hint="Give a tokenizer of transformers, a directory that holds tokenizer.json, or False for none.",
                **positions.fields(here()),
            )
        return given

    def _tokenizer_for_text(self) -> Any:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise InputError(
                "the input is text, and this model was opened without a tokenizer",
                hint="Give token ids, or set model.tokenizer.",
                **positions.fields(here()),
            )
        return tokenizer

    @functools.cached_property
    def config(self) -> Config:
        """The model's ``config.json``."""
        return Config(self._native.description["config"])

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        out: torch.dtype = getattr(torch, self._native.description["dtype"])
        return out

    @property
    def name_or_path(self) -> str:
        """What the model was opened by."""
        return self._name_or_path

    @property
    def directory(self) -> Path:
        """Where its files lie."""
        return self._directory

    def dispatch(self) -> LanguageModel:
        """Maps the weights, if they are not yet, and returns the model."""
        self._native.load()
        return self

    @property
    def dispatched(self) -> bool:
        """Whether the weights are mapped."""
        return self._native.loaded

    def close(self) -> None:
        """Gives the weights back without waiting for Python's collector. Tensors that were handed out stay valid."""
        self._native.close()


def _is_hosted(name: Any, options: dict[str, Any]) -> tuple[bool, Path | None]:
    """Whether a model is computed by transformers: it is one, or the engine does not know its architecture.

    Gives the model's directory as well, where it had to be looked for.
    """
    if isinstance(name, torch.nn.Module) or options.get("native") is False:
        return True, None
    if options.get("native") or remotely.is_server(options.get("remote")) or not isinstance(name, str | os.PathLike):
        return False, None
    where = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}
    try:
        directory = hub.resolve(name, **where)
    except NnsightError:
        return False, None  # opening it tells what is wrong
    try:
        architectures = json.loads((directory / "config.json").read_text()).get("architectures")
    except (OSError, ValueError, AttributeError):
        return False, directory
    known = isinstance(architectures, list) and bool(architectures)
    return known and architectures[0] not in _ffi.version()["architectures"], directory


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    if given is None or given == "auto":
        return None
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if found not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise InputError(
            f"{given!r} cannot be the dtype of a model",
            hint="Give torch.float32, torch.bfloat16 or torch.float16.",
            **positions.fields(here()),
        )
    assert isinstance(found, torch.dtype)
    return found


def _device(given: Any) -> torch.device:
    """The device that ``device_map`` names: the CPU, or one of torch's accelerator (CUDA, XPU, ...)."""
    if isinstance(given, Mapping):
        places = set(given.values())
        if len(places) != 1:
            raise InputError(
                f"the model computes on one device, and device_map names {len(places)}",
                hint='Give one of them, or "auto".',
                **positions.fields(here()),
            )
        given = places.pop()
    if given is None:
        return torch.device("cpu")
    fast = torch.accelerator.current_accelerator(check_available=True)
    if given == "auto":
        given = fast or "cpu"
    try:
        device = torch.device(fast.type if fast else "cuda", given) if isinstance(given, int) else torch.device(given)
    except RuntimeError:
        raise InputError(
            f"{given!r} is no device",
            hint='Give "auto", "cpu" or "cuda:0".',
            **positions.fields(here()),
        ) from None
    if device.type != "cpu" and not (
        fast and device.type == fast.type and (device.index or 0) < torch.accelerator.device_count()
    ):
        raise ModelLoadError(
            f"the model cannot be put on {device}: there is no such device here",
            hint='device_map="auto" takes the GPU where there is one, and the CPU else.',
            **positions.fields(here()),
        )
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return device
