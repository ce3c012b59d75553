"""``LanguageModel`` over a model of transformers that the engine does not compute itself."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from . import inputs, positions
from . import remote as remotely
from .errors import InputError, ModelLoadError
from .hosted import Given, Layout
from .model import LanguageModel, _device, _dtype
from .positions import here
from .tokenizer import Tokenizer
from .wrapping import HostedInvoker, HostedRecorder, HostedScanRecorder, HostedTracer, NNsight

if TYPE_CHECKING:
    from .continuation import Continuation
    from .runners import Runner

# What a trace's keywords mean for the tokenizer; all others are the module's own.
_TOKENIZING = ("add_special_tokens", "max_length", "truncation")

_MADE_UP = [[0] * 7] * 2  # an input for edits, of which nothing but the structure matters


def transformers() -> ModuleType:
    """The library, which is an extra.

    Raises:
        ModelLoadError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise ModelLoadError(
            "this model is not one that the engine computes itself, and transformers, which does, is not installed",
            hint="Install it: pip install 'nnsight_go[hf]'.",
            **positions.fields(here()),
        ) from None


class HostedLanguageModel(NNsight, LanguageModel):
    """A language model whose forward pass is transformers' own. Made by ``LanguageModel``.

    Texts become padded token ids as for other models: on the left for decoders, which get position ids that
    leave the padding out; on the right for encoders. Decoder blocks give a tuple, as elsewhere.
    """

    def __init__(
        self,
        name: str | os.PathLike[str] | torch.nn.Module,
        *,
        device_map: Any = None,
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
        **options: Any,
    ) -> None:
        if isinstance(name, torch.nn.Module) and not hasattr(name, "config"):
            raise InputError(
                f"a {type(name).__name__} is no model of transformers: it has no config",
                hint="NNsight(module) wraps any module.",
                **positions.fields(here()),
            )
        library = transformers()
        if isinstance(name, torch.nn.Module):
            module, directory = name, Path(getattr(getattr(name, "config", None), "_name_or_path", "") or ".")
        else:
            directory = self._locate(name, revision, token, cache_dir, local_files_only)
            module = _open(library, directory, _dtype(dtype if dtype is not None else torch_dtype), options)
            module = module.to(_device(device_map)).eval()
        NNsight.__init__(self, module, rename=rename)
        self._hosted.wrapped = _blocks(module)
        self._directory, self._name_or_path = directory, os.fspath(directory)
        self._tokenizer_given, self._tokenizer = tokenizer, None
        self._edits = ()
        self._rename = dict(rename or {})
        self._parameters_of_forward = set(inspect.signature(module.forward).parameters)

    # ---- tracing ----

    def trace(
        self,
        *inputs: Any,
        remote: bool | str | None = None,
        blocking: bool = True,
        trace: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Begins a trace, as of other language models; keywords are also those of the module's forward."""
        self._runner(remote)
        tracer = LanguageTracer(self, inputs, kwargs)
        if trace:
            return tracer
        if self._edits:
            return tracer._output()
        args, named = tracer._given or ((), {})
        return self._module(*args, **named)

    def _runner(self, remote: bool | str | None, blocking: bool = True) -> None:
        """Nothing: such a model is computed here."""
        remotely.refuse(remote)

    def scan(self, *inputs: Any, **kwargs: Any) -> LanguageTracer:
        """A trace that runs nothing, as of other modules; it takes what ``trace`` takes."""
        return LanguageTracer(self, inputs, kwargs, HostedScanRecorder)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        """What the module is called with."""
        named = {k: v for k, v in kwargs.items() if k not in (*_TOKENIZING, "input_ids", "attention_mask")}
        about = {k: v for k, v in kwargs.items() if k not in named}
        if "use_cache" in self._parameters_of_forward:
            named.setdefault("use_cache", False)
        if not args and "input_ids" not in about:
            return (), named | about
        rows, masks = inputs.read(self._tokenizer_for_text, args, about)
        named = self._batch(rows, masks) | named
        config = self._module.config
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in named:
            start = getattr(config, "decoder_start_token_id", None)
            start = start if start is not None else getattr(config, "bos_token_id", 0) or 0
            named["decoder_input_ids"] = torch.full((len(rows), 1), start, device=self.device)
        return (), named

    def input_of(self, prompt: Any) -> Given:
        """What the module is called with for a prompt, as ``trace`` takes it; a dictionary says it by name."""
        return self._given((), prompt) if isinstance(prompt, dict) else self._given((prompt,), {})

    def _example(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
        """The access points that an edit may name: without an example those of rows of token ids, which are made up."""
        if args or kwargs:
            return self._hosted.layout(self._given(args, kwargs))
        try:
            return self._hosted.imagined(self._given((_MADE_UP,), {}))
        except Exception:  # it takes no ids, or more than them
            return super()._example(args, kwargs)

    def _batch(
        self, rows: list[list[int]], masks: list[list[int]] | None, pad: int | None = None
    ) -> dict[str, torch.Tensor]:
        longest = max(map(len, rows))
        decoder = "position_ids" in self._parameters_of_forward and _decodes(self._module)
        pad = getattr(self._module.config, "pad_token_id", None) or 0 if pad is None else pad
        ids, seen = [], []
        for row, mask in zip(rows, masks or [[1] * len(row) for row in rows], strict=True):
            fill = longest - len(row)
            ids.append([pad] * fill + row if decoder else row + [pad] * fill)
            seen.append([0] * fill + mask if decoder else mask + [0] * fill)
        out = {"input_ids": torch.tensor(ids, device=self.device)}
        counts = torch.tensor(seen, device=self.device)
        if not bool(counts.all()):
            out["attention_mask"] = counts
            if decoder:
                out["position_ids"] = (counts.cumsum(-1) - 1).clamp_min(0)
        return out

    # ---- what belongs to the model ----

    @property
    def config(self) -> Any:
        """The module's own."""
        return self._module.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self._module.parameters()).dtype

    @property
    def dispatched(self) -> bool:
        """Always: the module is there."""
        return True

    def dispatch(self) -> HostedLanguageModel:
        """The model itself."""
        return self

    def close(self) -> None:
        """Nothing: the module belongs to Python."""

    def _open_tokenizer(self) -> Any:
        if self._tokenizer_given is None or self._tokenizer_given is True:
            if not (self._directory / "tokenizer.json").is_file():
                return None
            return Tokenizer(self._directory, name_or_path=self._name_or_path)
        return super()._open_tokenizer()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer it was opened with, or that lies beside the weights; None where there is none."""
        if self._tokenizer is None and self._tokenizer_given is not False:
            self._tokenizer = self._open_tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer_given, self._tokenizer = False if value is None else value, None

    # ---- generation ----

    def _inputs_of(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Takes the inputs by name out of what ``generate`` was given: tensors, and what is for the tokenizer."""
        names = ("input_ids", "attention_mask", "add_special_tokens", "truncation")  # max_length is the rows' here
        return {k: settings.pop(k) for k in list(settings) if k in names or isinstance(settings[k], torch.Tensor)}

    def _continue(
        self,
        args: tuple[Any, ...],
        by_name: dict[str, Any],
        settings: dict[str, Any],
        runner: Runner | None = None,
    ) -> Continuation:
        able = getattr(self._module, "can_generate", None)
        if able is None or not able():
            raise InputError(
                f"a {type(self._module).__name__} writes no text",
                hint="Open a model with a head for it, such as a ...ForCausalLM.",
                **positions.fields(here()),
            )
        from .hosted_generation import HostedContinuation

        return HostedContinuation(self, args, by_name, settings)

    def _prompt(self, args: tuple[Any, ...], by_name: dict[str, Any], pad: int) -> dict[str, Any]:
        """What transformers' ``generate`` is given to continue; ``pad`` fills up short rows."""
        about = {k: v for k, v in by_name.items() if k in (*_TOKENIZING, "input_ids", "attention_mask")}
        named = {k: v for k, v in by_name.items() if k not in about}
        if not args and "input_ids" not in about:
            return named | about
        rows, masks = inputs.read(self._tokenizer_for_text, args, about)
        batch = self._batch(rows, masks, pad)
        batch.pop("position_ids", None)
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        return batch | named


class LanguageTracer(HostedTracer):
    """One trace of a hosted language model."""

    model: HostedLanguageModel

    def __init__(
        self,
        model: HostedLanguageModel,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: type[HostedRecorder] = HostedRecorder,
    ) -> None:
        super().__init__(model, args, kwargs, kind)
        if self._given is not None:
            self._given = model._given(args, kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> HostedInvoker:
        """Begins one input of the trace: ``with tracer.invoke("Hello"):``. Each is as if it ran alone.

        The last may have no input: it sees the rows of all others, which then have as many tokens each.
        """
        return HostedInvoker(self, self.model._given(args, kwargs) if args or kwargs else ((), {}))


def _open(library: ModuleType, directory: Path, dtype: torch.dtype | None, options: dict[str, Any]) -> torch.nn.Module:
    config = library.AutoConfig.from_pretrained(directory)
    names = getattr(config, "architectures", None) or []
    kind = getattr(library, names[0], None) if names else None
    try:
        opened = (kind or library.AutoModel).from_pretrained(
            directory, dtype=dtype or "auto", output_loading_info=True, **options
        )
    except (OSError, ValueError, TypeError) as error:
        raise ModelLoadError(
            f"{directory} cannot be opened by transformers: {error}", **positions.fields(here())
        ) from None
    found, info = opened
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random ones
        raise ModelLoadError(
            f"{directory} lacks {len(missing)} weights of a {type(found).__name__}: {', '.join(missing[:3])}"
            + (", ..." if missing[3:] else ""),
            hint="Wrap a model that you have opened yourself, LanguageModel(module), if they are to be random.",
            **positions.fields(here()),
        )
    assert isinstance(found, torch.nn.Module)
    return found


def _blocks(module: torch.nn.Module) -> set[str]:
    """Paths of decoder blocks, which give a tuple whose first value are the hidden states."""
    layers = importlib.import_module("transformers.modeling_layers")
    kind = layers.GradientCheckpointingLayer
    return {path for path, m in module.named_modules() if isinstance(m, kind)} if _decodes(module) else set()


def _decodes(module: torch.nn.Module) -> bool:
    """Whether it is a decoder by itself, which reads from the left."""
    config = getattr(module, "config", None)
    return (
        type(module).__name__.endswith("ForCausalLM")
        or type(module).__name__.endswith("LMHeadModel")
        or bool(getattr(config, "is_decoder", False) and not getattr(config, "is_encoder_decoder", False))
    )
