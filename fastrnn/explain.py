"""explain(): which back end computes what in a model, and why no other does."""

from __future__ import annotations

from typing import Any

import torch

from fastrnn import backends, convert
from fastrnn.nn.attention import Attention
from fastrnn.nn.decoder import AttentionDecoder
from fastrnn.nn.options import WithOptions
from fastrnn.nn.rnn import Layers


def explain(module: torch.nn.Module, *args: Any, **kwargs: Any) -> str:
    """Runs ``module(*args, **kwargs)`` once and tells which back end computed each recurrent layer and direction,
    and each call of attention.

    For every other back end it says why that was passed over, and for each of torch.nn's own recurrent modules why it
    is not one of fastrnn's. Gradients, the state of the random number generators and buffers stay as they were.

    Returns:
        The text, which is printed as well.
    """
    calls: dict[str, int] = {}  # text -> how many calls it describes, in order of first appearance
    handles = []
    with backends.recorded_choices() as choices:
        for name, part in module.named_modules():
            title = f"{name or 'the module itself'} ({type(part).__name__})"
            if isinstance(part, AttentionDecoder):

                def start(*_: Any) -> None:
                    choices.clear()

                def note_loop(_: torch.nn.Module, *__: Any, title: str = title) -> None:
                    # Step by step, its layers and its attention have their own words.
                    for choice in choices:
                        if choice.call.startswith("decoder loop"):
                            calls[f"{title}: {choice}"] = calls.get(f"{title}: {choice}", 0) + 1

                handles += [part.register_forward_pre_hook(start), part.register_forward_hook(note_loop)]
            elif isinstance(part, (WithOptions, Attention)):

                def forget(*_: Any) -> None:
                    choices.clear()

                def note(part: torch.nn.Module, *_: Any, title: str = title) -> None:
                    texts = [f"{_place(part, index, len(choices))}: {choice}" for index, choice in enumerate(choices)]
                    if not texts and isinstance(part, WithOptions):
                        texts = [": computed by its own forward(), which did not call super().forward()"]
                    for text in texts or [": torch's own operations, there are no kernels for it"]:
                        calls[title + text] = calls.get(title + text, 0) + 1

                handles += [part.register_forward_pre_hook(forget), part.register_forward_hook(note)]
            elif convert.torch_class(part):
                reasons = convert.reasons_against(part) or ["fastrnn.accelerate was not called on it"]
                calls[_by_torch(title, reasons)] = 1
            elif isinstance(part, torch.jit.ScriptModule) and part.original_name in convert.NAMES:
                title = f"{name or 'the module itself'} ({part.original_name})"
                calls[_by_torch(title, ["torch.jit.script has compiled it"])] = 1
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        try:
            with torch.no_grad(), torch.random.fork_rng():
                module(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
    text = "\n".join(text if count == 1 else f"{count} calls of {text}" for text, count in calls.items())
    text = text or "no recurrent or attention module was called"
    print(text)
    return text


def _by_torch(title: str, reasons: list[str]) -> str:
    return f"{title}: computed by torch.nn\n" + "\n".join(f"  not fastrnn: {reason}" for reason in reasons)


def _place(module: torch.nn.Module, index: int, recorded: int) -> str:
    """Which layer and direction the call of this index was."""
    if not isinstance(module, Layers):
        return ""
    directions = 2 if module.bidirectional else 1
    if recorded < module.num_layers * directions:  # torch's operator took them all in one call.
        return ", all layers"
    layer = index // directions % module.num_layers  # A subclass may call super().forward() several times.
    return f", layer {layer}" + (" reverse" if index % directions else "")
