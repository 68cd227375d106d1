"""The expert-parallel MoE layer as a module of PyTorch."""

from __future__ import annotations

import copy
from typing import Any, Optional, Sequence, Union

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

import expar

from .ops_moe import Core, moe
from .shards import ExpertShard, Where, shard_over

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _placements(mesh: DeviceMesh, experts: int) -> list[Placement]:
    """How the parameters of experts lie on a mesh."""
    names = mesh.mesh_dim_names or ("ep",)
    sizes = dict(zip(names, mesh.shape))
    if sizes.get("tp", 1) > 1 or experts % sizes.get("ep", 1) != 0:
        raise expar.BadArgument(
            f"{experts} experts on a mesh of {sizes}: DTensors hold whole experts, as many on each rank; for slices or "
            "uneven numbers, which no distributed checkpoint can hold, pass context=expar.torch.parallel(mesh)"
        )
    return [Shard(0) if name == "ep" else Replicate() for name in names]


class _SomeExperts(nn.Module):
    """Some of the experts as plain tensors, which look alike on all ranks: a state dict says which they are."""

    def __init__(self, which: ExpertShard) -> None:
        super().__init__()
        self.held = [which.part, which.parts, which.slice, which.slices]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.held)

    def set_extra_state(self, state: Tensor) -> None:
        if state.tolist() == self.held:
            return
        experts = "part {} of {} of the experts, slice {} of {}"
        raise expar.BadArgument(
            f"the state dict holds {experts.format(*state.tolist())}, this rank {experts.format(*self.held)}: load the "
            "file of this rank, or a distributed checkpoint of layers that were made on a DeviceMesh"
        )


class MoELayer(nn.Module):
    """``out = moe(x) + shared(x) + residual`` over the ranks of ``context``, which hold E / P experts each.

    Parameters, named as in C++: ``router.weight [E, H]``, ``experts.up [L, 2F, H]`` (gate, then up; ``[L, F, H]`` of
    plain activations), ``experts.down [L, H, F]``, and where the layer has them ``router.bias``, ``experts.up_bias``,
    ``experts.down_bias``, ``shared.up``, ``shared.down``, ``shared.gate``, ``special.mix``, ``special.value``. They are
    the only copy: whatever changes one, the next pass computes with it. A state dict holds this rank's experts, and is
    refused where others are; on a DeviceMesh the experts' parameters are DTensors, Shard(0) along ep, which distributed
    checkpoints bring to any number of ranks.

    After each pass:
      aux_loss : [] f32, the sum of the router's losses with their coefficients, differentiable. It is one number of
                 all ranks. Each rank adds it to its own loss; the gradient of the sum of all ranks' losses then counts
                 it P times, and that of their mean, which DDP and FSDP make, once.
      load     : [E] int64, slots that the router gave each expert over all ranks; passes that keep nothing leave out
                 special experts
      dropped  : [] int64, slots over all ranks that a capacity left out
      ids      : [T, K] int32, the experts that each token of this rank went to, best first; -1: none

    Gradients: those of experts are of the sum of all ranks' losses; those of the other parameters are of this rank's
    loss alone, but for aux_loss, which counts as said. distributed_data_parallel, fully_shard and average_gradients of
    expar.torch make both those of the mean of all ranks' losses.
    In eval mode under torch.no_grad nothing is kept, there is no jitter and no loss. Eval mode with gradients computes
    as training does, and raises where that differs (jitter, sinkhorn).
    """

    def __init__(
        self,
        hidden: int,
        inner: int,
        experts: int,
        topk: int,
        *,
        router: Union[str, expar.RouterOptions] = "mixtral",
        context: Where = None,
        activation: str = "swiglu",
        numbers: Optional[dict[str, float]] = None,
        capacity: Optional[expar.CapacityOptions] = None,
        special: Sequence[int] = (0, 0, 0),
        bias: bool = False,
        weights_on: str = "output",
        shared_inner: int = 0,
        shared_gate: bool = False,
        payload: Optional[str] = None,
        gradient_payload: Optional[str] = None,
        recompute: bool = False,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        prefix: str = "",
        **router_settings: Any,
    ) -> None:
        """
        hidden, inner, experts, topk : H, F, E, K
        router          : RouterOptions, or the name of a router_preset
        context         : the ranks that tokens travel among; a DeviceMesh with dims as for expar.torch.parallel; a
                          Parallel, which may also say who holds slices of the same experts; a process group, or None,
                          is what expar.torch.context() makes of it
        activation ... recompute : as expar.MoeLayer
        dtype           : of x and of the experts' weights, torch.float32 or torch.bfloat16; the router computes in f32
        seed, prefix    : what the parameters are drawn by, see reset_parameters
        router_settings : attributes of the RouterOptions: balance=0.01, z=0.001, ...

        Collective. Raises BadArgument, Mismatch, NoMemory, Timeout, PeerLost: the same on every rank.
        """
        super().__init__()
        if dtype not in _DTYPES:
            raise expar.BadArgument(f"dtype is {dtype}, should be torch.float32 or torch.bfloat16")
        self.hidden, self.inner, self.dtype = hidden, inner, dtype
        options = expar.router_preset(router, experts, topk) if isinstance(router, str) else copy.copy(router)
        options.experts, options.topk = experts, topk
        for name, value in router_settings.items():
            setattr(options, name, value)
        self.router_options = options
        self.context, tensor, shard = shard_over(context)
        self._options = {
            "hidden": hidden,
            "inner": inner,
            "router": options,
            "activation": activation,
            "numbers": numbers or {},
            "capacity": capacity or expar.CapacityOptions(),
            "special": list(special),
            "bias": bias,
            "weights_on": weights_on,
            "shared_inner": shared_inner,
            "shared_gate": shared_gate,
            "dtype": _DTYPES[dtype],
            "payload": payload,
            "gradient_payload": gradient_payload,
            "tensor": tensor,
        }
        self._recompute = recompute
        native = self._make()
        self.local_experts: tuple[int, int] = native.local_experts
        # What torch.compile may look at.
        self._jitters = options.jitter > 0
        self._differs_in_eval = self._jitters or options.choice == "sinkhorn"
        placements = _placements(context, experts - sum(special)) if isinstance(context, DeviceMesh) else None
        self._parts: list[tuple[nn.Module, str, torch.dtype]] = []
        for p in native.expert_parameters() + native.dense_parameters():
            part, name = p.name.split(".")
            if not hasattr(self, part):
                plain = part == "experts" and placements is None and shard.parts * shard.slices > 1
                self.add_module(part, _SomeExperts(shard) if plain else nn.Module())
            reads = torch.bfloat16 if p.has_low else torch.float32
            values = torch.zeros(p.shape, dtype=reads)
            if part == "experts" and placements is not None:
                values = DTensor.from_local(values, context, placements, run_check=False)
            self.get_submodule(part).register_parameter(name, nn.Parameter(values))
            self._parts.append((self.get_submodule(part), name, reads))
        self.experts.expert_shard = shard
        for name in ("selection_bias", "token_table"):
            state = getattr(native, name)
            self.register_buffer(name, None if state is None else torch.from_dlpack(state).clone())
        self.aux_loss: Optional[Tensor] = None
        self.load: Optional[Tensor] = None
        self.dropped: Optional[Tensor] = None
        self.ids: Optional[Tensor] = None
        if not self.router.weight.is_meta:
            self.reset_parameters(seed, prefix)

    def _make(self) -> expar.MoeLayer:
        """The library's layer, on parameters that each pass hands in. Collective."""
        native = expar.MoeLayer(self.context, **self._options, recompute=self._recompute, lent=True)
        self._use(Core(self.context, native, self.router_options, slices=self._options["tensor"]))
        return native

    def _use(self, core: Core) -> None:
        self._core = core
        self._name = core.name

    def __reduce__(self):
        raise TypeError("a layer belongs to the ranks that made it: save its state_dict(), not the layer")

    def __deepcopy__(self, memo: dict) -> MoELayer:
        """Collective, as the constructor. Raises BadArgument after for_inference()."""
        if not self._parts:
            raise expar.BadArgument("a layer made by for_inference() cannot be copied: copy it before")
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        shared = {n: self.__dict__[n] for n in ("context", "router_options", "_options", "_core")}
        last = dict.fromkeys(("aux_loss", "load", "dropped", "ids"))
        others = {n: v for n, v in self.__dict__.items() if n not in shared and n not in last}
        copied.__dict__.update(shared, **last, **copy.deepcopy(others, memo))
        copied._make()
        return copied

    @torch.no_grad()
    def reset_parameters(self, seed: int, prefix: str = "") -> None:
        """Draws every parameter by its global name "<prefix>.experts.5.up": the C++ layer's numbers, whatever P is.

        Weights normal with deviation 1 / sqrt(inputs), biases 0. Not collective. A layer that was made on the device
        "meta" has none yet: to_empty(device="cpu") first.
        """
        core = self._core
        read = [torch.empty(p.shape, dtype=reads, device="cpu") for p, reads in self._parameters_read()]
        core.lend(read)
        core.native.initialise(seed, prefix)
        for (p, _), drawn in zip(self._parameters_read(), read):
            p.copy_(drawn)
        for name in ("selection_bias", "token_table"):
            if getattr(self, name) is not None:
                getattr(self, name).copy_(torch.from_dlpack(getattr(core.native, name)))

    def _parameters_read(self) -> list[tuple[Tensor, torch.dtype]]:
        """What this rank holds of each parameter, and the dtype in which the layer reads it."""
        held = []
        for part, name, reads in self._parts:
            p = getattr(part, name)
            if isinstance(p, DTensor):
                if part is not self.experts:
                    raise expar.BadArgument(f"{name} of the layer is sharded by FSDP here: call unshard() first")
                p = p.to_local()
            held.append((p, reads))
        return held

    def forward(
        self,
        x: Tensor,
        mask: Optional[Tensor] = None,
        tokens: Optional[Tensor] = None,
        residual: Optional[Tensor] = None,
        ids: Optional[Tensor] = None,
    ) -> Tensor:
        """
        x, residual : [..., H] of the layer's dtype; of [..., S, H], the S are a sequence (for sequence_balance)
        mask        : [...] bool or int8: 0 is padding, which goes nowhere
        tokens      : [...] token ids, for a router with a token table
        ids         : [T, K] int32, ``self.ids`` of a pass that is to be repeated, by all ranks or none; weights are of
                      today's scores
        returns     : [..., H]

        Collective. Raises BadArgument, Mismatch, NoMemory, Timeout, PeerLost, Internal: the same on every rank.
        """
        trains = self.training or torch.is_grad_enabled()
        if not self._parts:
            if self.training:
                raise expar.BadArgument("the layer was made for inference alone by for_inference(): call eval()")
            trains = False
        if trains and not self.training and self._differs_in_eval:
            raise expar.BadArgument(
                "in eval mode a router with jitter or sinkhorn decides otherwise, without gradients: use no_grad()"
            )
        flat = [None if t is None else t.reshape(-1, *t.shape[x.dim() - 1 :]) for t in (x, residual, mask, tokens)]
        parameters = [p if p.dtype == reads else p.to(reads) for p, reads in self._parameters_read()]
        seed = torch.randint(2**62, ()) if trains and self._jitters else None
        out, self.aux_loss, self.load, self.dropped, self.ids, _ = moe(
            flat[0],
            parameters,
            flat[1],
            flat[2],
            flat[3],
            self.selection_bias,
            self.token_table,
            seed,
            ids,
            self._name,
            x.shape[-2] if x.dim() > 1 else 1,
            trains,
        )
        return out.reshape(x.shape)

    def take_times(self) -> expar.PhaseTimes:
        """Milliseconds that this rank spent in each phase since the last call."""
        return self._core.native.take_times()

    @torch.no_grad()
    def update_selection_bias(self, rate: float, rule: str = "sign", counts: Optional[Sequence[int]] = None) -> None:
        """One step of ``selection_bias`` towards even loads, once per optimizer step.

        rule   : "sign" (DeepSeek-V3) or "centred" (torchtitan)
        counts : [E] slots per expert; None: of all passes that went backward since the last call, so that neither
                 evaluations nor repeated passes of a checkpoint count
        Not collective: all ranks have the same counts.
        """
        core = self._core
        if counts is None:
            counts, core.counts = core.counts, [0] * self.router_options.experts
        if self.selection_bias is None:
            raise expar.BadArgument("the router has no selection bias (RouterOptions.selection_bias)")
        expar.update_selection_bias(self.selection_bias, list(counts), rate, rule)

    @torch.no_grad()
    def for_inference(self, bound: int = 0) -> MoELayer:
        """Turns this layer into one for inference alone, in eval mode: the weights exist once, packed, and the
        parameters are dropped, so that nothing can be stale. Results are the same bytes.

        bound : tokens of each rank at the most, for plans that need no exchange of counts; 0: any number
        Collective. Raises: as the constructor; BadArgument (experts in slices).
        """
        if self._options["tensor"] is not None:
            raise expar.BadArgument("experts in slices cannot be packed from the parameters of one rank")
        native = expar.MoeLayer(self.context, **self._options, inference=True, bound=bound)
        held = {n: p.to(reads).contiguous() for n, (p, reads) in zip(self._core.names, self._parameters_read())}
        first, count = self.local_experts
        names = [n for n in ("up", "down", "up_bias", "down_bias") if f"experts.{n}" in held]
        for e in range(count):
            native.write_expert(first + e, **{n: held[f"experts.{n}"][e] for n in names})
        if "shared.up" in held:
            native.write_shared(*(held[n] for n in ("shared.up", "shared.down", "shared.gate") if n in held))
        for p in native.dense_parameters():
            torch.from_dlpack(p.value).copy_(held[p.name])
        for part, name, _ in self._parts:
            part.register_parameter(name, None)
        self._parts = []
        self._use(Core(self.context, native, self.router_options, lent=False))
        return self.eval()

    def _apply(self, fn, recurse=True):
        bias = self.selection_bias
        super()._apply(fn, recurse)
        # A bias moves by rates that bf16 does not hold.
        if bias is not None and self.selection_bias.dtype != bias.dtype:
            self.selection_bias = bias
        return self

    def extra_repr(self) -> str:
        first, count = self.local_experts
        return (
            f"hidden={self.hidden}, inner={self.inner}, experts={self.router_options.experts}, "
            f"topk={self.router_options.topk}, local_experts={first}..{first + count - 1}, dtype={self.dtype}"
        )
