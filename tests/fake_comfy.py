"""ComfyUI's extension points in two hundred lines: a MODEL, a guider with euler, and a small Flux of plain matrices.

As the real thing does, blocks add in place (which ones differs by version, so both ways are offered), every model call
gets an options dict of its own, and options are deep-copied by clones. Nothing here knows of hasten.
"""

from __future__ import annotations

import copy
import types
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16


class Executor:
    """comfy.patcher_extension.WrapperExecutor: wrappers around a function, the first one outermost."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Any], index: int = 0) -> None:
        self.original, self.class_obj, self.wrappers, self.index = original, class_obj, wrappers, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Executor(self.original, self.class_obj, self.wrappers, self.index + 1).execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.index == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.index](self, *args, **kwargs)


def wrappers(options: dict[str, Any], kind: str) -> list[Any]:
    return [w for listed in options.get("wrappers", {}).get(kind, {}).values() for w in listed]


def copied(options: dict[str, Any]) -> dict[str, Any]:
    return {k: copied(v) if isinstance(v, dict) else list(v) if isinstance(v, list) else v for k, v in options.items()}


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:])


class Modulation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, vec: Tensor) -> Any:
        shift, scale = self.lin(vec)[:, None].chunk(2, dim=-1)
        return types.SimpleNamespace(shift=shift, scale=scale), None


class DoubleBlock(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.img_mod, self.img_norm1, self.in_place = Modulation(), Norm(), in_place
        self.img, self.txt = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        mod = self.img_mod(vec)[0]
        seen = self.img_norm1(img) * (1 + mod.scale) + mod.shift
        both = torch.tanh(self.img(torch.cat((seen, txt.mean(1, keepdim=True).expand_as(img)), -1)))
        txt += 0.1 * torch.tanh(self.txt(torch.cat((txt, seen.mean(1, keepdim=True).expand_as(txt)), -1)))
        if self.in_place:
            img += both
            return img, txt
        return img + both, txt


class SingleBlock(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear, self.in_place = nn.Linear(2 * WIDTH, WIDTH), in_place

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        out = torch.tanh(self.linear(torch.cat((x, x.mean(1, keepdim=True).expand_as(x)), -1))) * vec[:, None]
        if self.in_place:
            x += out
            return x
        return x + out


class Flux(nn.Module):
    """Latents (B, 4, H, W) in and out; its hooks and its ControlNet adds lie where ComfyUI's lie."""

    __module__ = "comfy.ldm.flux.model"

    def __init__(
        self, double: int = 3, single: int = 3, *, newer: bool = False, handed: bool = True, seed: int = 0
    ) -> None:
        """newer: which blocks add in place. handed: blocks get the options, as they do since 0.3.60."""
        super().__init__()
        self.handed = handed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.img_in, self.txt_in = nn.Linear(4, WIDTH), nn.Linear(8, WIDTH)
            self.time_in, self.final_layer = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)
            self.double_blocks = nn.ModuleList(DoubleBlock(in_place=newer) for _ in range(double))
            self.single_blocks = nn.ModuleList(SingleBlock(in_place=not newer) for _ in range(single))
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, control: Any, transformer_options: Any) -> Tensor:
        b, c, h, w = x.shape
        vec = torch.cos(self.time_in(t[:, None]))
        img = self.blocks(self.img_in(x.flatten(2).transpose(1, 2)), self.txt_in(context), vec, control,
                          transformer_options)  # fmt: skip
        return self.final_layer(img).transpose(1, 2).reshape(b, c, h, w)

    def options(self, transformer_options: Any) -> dict[str, Any]:
        return {"transformer_options": transformer_options} if self.handed else {}

    def blocks(self, img: Tensor, txt: Tensor, vec: Tensor, control: Any, transformer_options: Any) -> Tensor:
        replace = transformer_options.get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(self.double_blocks):
            if ("double_block", i) in replace:

                def double(args: Any, block: Any = block) -> dict[str, Tensor]:
                    img, txt = block(args["img"], args["txt"], args["vec"])
                    return {"img": img, "txt": txt}

                given = {"img": img, "txt": txt, "vec": vec, **self.options(transformer_options)}
                out = replace[("double_block", i)](given, {"original_block": double})
                img, txt = out["img"], out["txt"]
            else:
                img, txt = block(img, txt, vec)
            if control and i < len(control.get("input", ())):
                img[:, : control["input"][i].shape[1]] += control["input"][i]
        img = torch.cat((txt, img), 1)
        for i, block in enumerate(self.single_blocks):
            if ("single_block", i) in replace:

                def single(args: Any, block: Any = block) -> dict[str, Tensor]:
                    return {"img": block(args["img"], args["vec"])}

                given = {"img": img, "vec": vec, **self.options(transformer_options)}
                img = replace[("single_block", i)](given, {"original_block": single})["img"]
            else:
                img = block(img, vec)
            if control and i < len(control.get("output", ())):
                img[:, txt.shape[1] :] += control["output"][i]
        return img[:, txt.shape[1] :]


class Base:
    """comfy.model_base.BaseModel: hands over x - sigma * velocity."""

    def __init__(self, network: nn.Module) -> None:
        self.diffusion_model = network

    def apply_model(self, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
                    transformer_options: Any = None, **more: Any) -> Tensor:  # fmt: skip
        run = Executor(self._apply, self, wrappers(transformer_options, "apply_model"))
        out: Tensor = run.execute(x, t, c_concat, c_crossattn, control, transformer_options, **more)
        return out

    def _apply(self, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
               transformer_options: Any = None, **more: Any) -> Tensor:  # fmt: skip
        velocity = self.diffusion_model(x, t, c_crossattn, control, transformer_options)
        out: Tensor = x - velocity * t[:, None, None, None]
        return out


class Sampling:
    """ModelSamplingFlux with shift 0: percents are sigmas from behind."""

    def percent_to_sigma(self, percent: float) -> float:
        return 1.0 - percent


class Patcher:
    """comfy.model_patcher.ModelPatcher."""

    def __init__(self, model: Base) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> Patcher:
        new = Patcher(self.model)
        new.model_options = copy.deepcopy(self.model_options)
        new.wrappers = copied(self.wrappers)
        return new

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_model_object(self, name: str) -> Any:
        assert name == "model_sampling"
        return Sampling()


class Guider:
    """comfy.samplers.CFGGuider with the euler sampler."""

    def __init__(self, patcher: Patcher, conds: list[Tensor], cfg: float = 1.0, *, together: bool = False,
                 control: Any = None, calls_a_step: int = 1, threads: bool = False) -> None:  # fmt: skip
        self.model_patcher, self.model_options = patcher, patcher.model_options
        self.conds = [(uuid.uuid4(), cond) for cond in conds]
        self.cfg, self.together, self.control, self.calls_a_step = cfg, together, control, calls_a_step
        self.threads = threads

    def sample(self, noise: Tensor, sigmas: Tensor, callback: Any = None) -> Tensor:
        before = self.model_options
        self.model_options = copied(before)
        own = self.model_options["transformer_options"].setdefault("wrappers", {})
        for kind, keyed in copied(self.model_patcher.wrappers).items():
            own.setdefault(kind, {}).update(keyed)
        run = Executor(self._outer, self, wrappers(self.model_options["transformer_options"], "outer_sample"))
        try:
            out: Tensor = run.execute(noise, torch.zeros_like(noise), "euler", sigmas, None, callback, True, 0)
            return out
        finally:
            self.model_options = before

    def _outer(self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, mask: Any = None,
               callback: Any = None, disable_pbar: bool = False, seed: Any = None) -> Tensor:  # fmt: skip
        options = copied(self.model_options)
        options["transformer_options"]["sample_sigmas"] = sigmas
        x = noise * sigmas[0]
        for step in range(len(sigmas) - 1):
            here, there = sigmas[step], sigmas[step + 1]
            for _ in range(self.calls_a_step):
                denoised = self._evaluate(x, here.expand(x.shape[0]), options)
            x = x + (x - denoised) / here * (there - here)
            if callback is not None:
                callback(step, x)
        return x

    def _evaluate(self, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> Tensor:
        run = Executor(self._predict, self, wrappers(self.model_options["transformer_options"], "predict_noise"))
        out: Tensor = run.execute(x, sigma, options, 0)
        return out

    def _predict(self, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any) -> Tensor:
        groups = [self.conds] if self.together else [[cond] for cond in self.conds]

        def run(group: list[Any]) -> list[Tensor]:
            to = copied(options["transformer_options"])
            to["uuids"], to["sigmas"] = [key for key, _ in group], sigma
            n = len(group)
            context = torch.cat([cond.expand(x.shape[0], -1, -1) for _, cond in group])
            base = self.model_patcher.model
            out = base.apply_model(torch.cat([x] * n), torch.cat([sigma] * n), None, context, self.control, to)
            return list(out.chunk(n))

        if self.threads:
            with ThreadPoolExecutor(len(groups)) as pool:
                results = list(pool.map(run, groups))
        else:
            results = [run(group) for group in groups]
        outs = [out for result in results for out in result]
        if len(outs) == 1:
            return outs[0]
        return outs[1] + self.cfg * (outs[0] - outs[1])
