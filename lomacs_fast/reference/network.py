"""LoMACS-SVDNet: from a channel matrix to its factors U, S, V without a decomposition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .angular_gate import AngularGate, panel
from .arguments import integer, number, positive
from .backbone import AttentionBlock, Block, ConvBlock, backbone
from .completion import complete_from_dft
from .dual_view import both_views, gate_project, real_view
from .freq_gate import AxialLowRankFreqGate
from .gated_conv import GatedConv1D
from .heads import svd_heads
from .ortho import NeuralOrthoRefiner, column_normalize
from .precision import autocast
from .projected_attention import GroupedProjectedAttention
from .refine import SpectralRefiner, dft_start, refine_svd
from .spectral import spectral_calibrate, svd_tail

STEPS = "_by_parts", "_front", "_backbone", "_columns", "_tail"

SOFTPLUS = 1.0, 20.0  # beta and threshold of the spectrum's head

FEW = 512  # numbers that are cheaper in a list

SHIFT = 0.005  # mu of the untrained steps on a filtered covariance, whose tail is nearly zero


def _unhooked(*modules: nn.Module) -> bool:
    """Whether calling past the modules leaves no hook of the user's uncalled, of theirs or of all modules."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
    return not _has_any_global_hook()


def _as_written(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling the module is calling the `forward` of one of these classes, hooks apart.

    A class derived from one, a wrapper or a `forward` set on the instance computes what the user wrote.
    """
    forward = getattr(type(module), "forward", None)
    return "forward" not in module.__dict__ and forward in [kind.forward for kind in kinds]


def _parts(block: nn.Module, d: int) -> tuple[nn.LayerNorm, nn.Module] | None:
    """Norm and mixer of a block that they make up and that may be passed by; else None."""
    if not _as_written(block, nn.Sequential) or len(cast(nn.Sequential, block)) != 2:
        return None
    norm, mixer = cast(nn.Sequential, block)
    if not (_as_written(norm, nn.LayerNorm) and _as_written(mixer, GroupedProjectedAttention, GatedConv1D)):
        return None
    # without a weight there is nothing that says to the mixer that it has a norm
    usual = norm.normalized_shape == (d,) and norm.weight is not None
    return (cast(nn.LayerNorm, norm), mixer) if usual and _unhooked(block, norm, mixer) else None


def _launches(x: Tensor) -> bool:
    """Whether calls on x are launches, of which one is better than many; a CPU gains nothing."""
    return x.is_cuda


def _readable(x: Tensor) -> bool:
    """Whether what is done may depend on x's numbers: they are here, and nothing traces or batches them."""
    if type(x) is not Tensor or x.device.type != "cpu" or torch._C._are_functorch_transforms_active():
        return False
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and _get_current_dispatch_mode() is None


def _residual(block: nn.Module, x: Tensor) -> Tensor:
    """`x + block(x)`, in one call of the mixer where norm and residual may be its own."""
    # autocast would take the residual to half precision too
    parts = None if autocast(x.device.type) else _parts(block, x.shape[-1])
    if parts is None:
        return x + cast(Tensor, block(x))
    norm, mixer = parts
    return cast(GroupedProjectedAttention | GatedConv1D, mixer).residual(x, norm)


class NetworkWeights(NamedTuple):
    """What `svd_network` takes of a network, each as the function of its stem does.

    `gate` four matrices; `projection` weight, bias and position; `norm` weight and bias; `scenes`
    `(n_scene, d)`; `heads` weight and bias of U and of V; `spectrum` weight and bias; `sizes` the two raw
    scalars of the refinement, of which `max_scale` is the bound; `eps` of every norm.
    """

    gate: tuple[Tensor, ...]
    temperature: float
    projection: tuple[Tensor, Tensor, Tensor]
    blocks: list[Block]
    norm: tuple[Tensor, Tensor]
    eps: float
    scenes: Tensor
    heads: tuple[Tensor, ...]
    spectrum: tuple[Tensor, Tensor]
    sizes: tuple[Tensor, Tensor]
    max_scale: float


class LoMACSSVDNet(nn.Module):
    """`forward(H, sid) -> U, S, V, Hd`: factors of a channel, `H ~ U diag(S) V^H`.

    Gate in the frequency domain, tokens of both views, `depth` pre-norm residual blocks (attention for even
    i, gated convolution for odd i), mean over tokens plus a scene embedding, linear heads, columns sorted by
    predicted singular value, one refinement step on each factor, calibration of S on the gated channel.

    Args:
        M, N: channel size, both at least 2.
        r: number of singular triplets, at most min(M, N).
        n_scene: number of scenes.
        dim: feature width d, a multiple of `groups`.
        depth: number of blocks.
        groups: groups of the attention.
        kernel_size: taps of the gated convolution, odd.
        temperature: divisor of the gate's logits, positive and finite.
        k_len: rows of the reduced keys and values; an integer, or one an attention block in order.
        tau_s: share of the measured spectrum in S, in [0, 1]; see `set_tau_s`.
        gate_hidden: width of the gate's perceptrons; channels of the angular gate.
        refine_steps: steps of `refine_svd`, with learned scalars, on the factors that the head gives; 0 is
            the published network. `set_refine_steps` changes it later: beyond the trained number the last
            step's scalars repeat.
        head: what the refinement starts from. `"pooled"` is the published network, refined on Hd.
            `"angular"` has no tokens: an `AngularGate` filters a Hermitian H (any other H is taken as it is),
            the `active` DFT columns of largest energy in it start, and S is calibrated by a factor and a
            share of the floor, both learned. It needs `refine_steps` of at least 1.
        active: columns that are refined, at most r; all when not given. The others are an orthonormal
            completion, with S = 0.
        array: polarisations, rows and columns of the antenna panel, for the angular gate; one row of M
            elements when not given.
        hermitian: H is a covariance: one factor serves both sides, V comes out as `U sign(d)`, d the
            eigenvalues. The Hermitian part of another H is decomposed.

    Input: H complex `(B, M, N)` or real `(B, M, N, 2)`; sid integer `(B,)`, or one integer for all.
    Output: U complex `(B, M, r)`, S real `(B, r)`, V complex `(B, N, r)`, Hd complex `(B, M, N)`. Columns
    follow the predicted spectrum, so S, after calibration, need not be sorted. A sample of zeros has S = 0.
    Refined factors are sorted by S and orthonormal to rounding.

    Raises:
        ValueError, TypeError: for an argument, size, dtype or scene that does not fit, naming it.
    """

    functions: ClassVar[Any] = SimpleNamespace(
        gate_project=gate_project,
        backbone=backbone,
        column_normalize=column_normalize,
        spectral_calibrate=spectral_calibrate,
        svd_heads=svd_heads,
        svd_tail=svd_tail,
        refine_svd=refine_svd,
    )
    modules_: ClassVar[Any] = SimpleNamespace(
        AxialLowRankFreqGate=AxialLowRankFreqGate,
        GroupedProjectedAttention=GroupedProjectedAttention,
        GatedConv1D=GatedConv1D,
        NeuralOrthoRefiner=NeuralOrthoRefiner,
        SpectralRefiner=SpectralRefiner,
    )
    # of pairs of real numbers; a twin without complex dtypes has another
    complex_of: ClassVar[Any] = staticmethod(torch.view_as_complex)
    tau_s: Tensor

    def __init__(
        self,
        M: int,
        N: int,
        r: int,
        n_scene: int,
        dim: int = 64,
        depth: int = 2,
        groups: int = 4,
        kernel_size: int = 3,
        temperature: float = 0.2,
        k_len: int | list[int] | tuple[int, ...] = 32,
        tau_s: float = 0.9,
        gate_hidden: int = 32,
        refine_steps: int = 0,
        head: str = "pooled",
        active: int | None = None,
        array: Sequence[int] | None = None,
        hermitian: bool = False,
    ) -> None:
        super().__init__()
        M, N, r = integer("M", M), integer("N", N), integer("r", r)
        for name, value in (("M", M), ("N", N)):
            if value < 2:
                raise ValueError(f"{name} must be at least 2 (the coarse map pools 2x2), got {value}")
        if not 1 <= r <= min(M, N):
            raise ValueError(f"r must lie between 1 and min(M, N) = {min(M, N)}, got {r}")
        n_scene, depth = integer("n_scene", n_scene, 1), integer("depth", depth, 0)
        dim, groups = integer("dim", dim), integer("groups", groups, 1)
        if dim < 1 or dim % groups:
            raise ValueError(f"dim must be a positive multiple of groups={groups}, got {dim}")
        kernel_size = integer("kernel_size", kernel_size)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        temperature = positive("temperature", temperature)
        gate_hidden = integer("gate_hidden", gate_hidden, 1)
        attentions = (depth + 1) // 2
        if isinstance(k_len, Sequence) and not isinstance(k_len, str):
            k_lens = [integer(f"k_len[{i}]", k, 1) for i, k in enumerate(k_len)]
            if len(k_lens) != attentions:
                raise ValueError(f"k_len must be an integer or {attentions} of them, got {k_len}")
        else:
            k_lens = [integer("k_len", k_len, 1)] * attentions
        if head not in ("pooled", "angular"):
            raise ValueError(f'head must be "pooled" or "angular", got {head!r}')
        if not isinstance(hermitian, bool):
            raise TypeError(f"hermitian must be True or False, got {hermitian!r}")
        if hermitian and M != N:
            raise ValueError(f"hermitian needs M = N, got {M} x {N}")
        refine_steps = integer("refine_steps", refine_steps, 1 if head == "angular" else 0)
        if not refine_steps and (active is not None or hermitian):
            raise ValueError("active and hermitian go with refine_steps of at least 1, got 0")
        if array is not None and not (head == "angular" and hermitian):
            raise ValueError(f'array goes with head "angular" of a hermitian H, got {array!r}')
        self.M, self.N, self.r, self.n_scene, self.dim, self.depth = M, N, r, n_scene, dim, depth
        self.groups, self.kernel_size, self.temperature = groups, kernel_size, temperature
        self.gate_hidden, self.head, self.hermitian = gate_hidden, head, hermitian
        # float64 and 0-d: exact in every precision, promotes nothing, and changing it recompiles nothing
        self.register_buffer("tau_s", torch.empty((), dtype=torch.float64), persistent=False)
        self.set_tau_s(tau_s)
        self.refine_steps = refine_steps
        if refine_steps:
            self.refiner = self.modules_.SpectralRefiner(refine_steps, r, active, hermitian=hermitian)
        self.array = list(panel(array, M)) if head == "angular" and hermitian else None
        if head == "angular":
            self.shrink = nn.Parameter(torch.empty(2))
            if self.array is not None:
                self.angular_gate = AngularGate(self.array, n_scene, gate_hidden)
        else:
            self._build_pooled(k_lens)
        self.reset_parameters()

    def _build_pooled(self, k_lens: list[int]) -> None:
        M, N, r, dim, depth = self.M, self.N, self.r, self.dim, self.depth
        m = self.modules_
        self.freq_gate = m.AxialLowRankFreqGate(M, N, self.gate_hidden, self.temperature)
        self.input_proj = nn.Linear(4 * N, dim)
        self.pos = nn.Parameter(torch.empty(1, M, dim))
        self.blocks = nn.ModuleList()
        for i in range(depth):
            if i % 2 == 0:
                mixer = m.GroupedProjectedAttention(dim, min(r, 32), self.groups, M, k_lens[i // 2])
            else:
                mixer = m.GatedConv1D(dim, self.kernel_size)
            self.blocks.append(nn.Sequential(nn.LayerNorm(dim), mixer))
        self.norm = nn.LayerNorm(dim)
        self.scene_emb = nn.Embedding(self.n_scene, dim)
        self.u_head = nn.Linear(dim, 2 * M * r)
        self.v_head = nn.Linear(dim, 2 * N * r)
        self.s_head = nn.Sequential(nn.Linear(dim, r), nn.Softplus())
        self.ortho_refine = m.NeuralOrthoRefiner()

    def reset_parameters(self) -> None:
        """Linear weights Xavier-uniform with zero bias (`s_head` bias -5), `pos` zero, `scene_emb` normal."""
        if self.head == "angular":
            with torch.no_grad():
                nn.init.zeros_(self.shrink)
                self.refiner.raw[:, 1] = math.log(SHIFT / (1 - SHIFT))
            return
        s_linear = cast(nn.Linear, self.s_head[0])
        for linear in (self.input_proj, self.u_head, self.v_head, s_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(s_linear.bias, -5.0)
        nn.init.zeros_(self.pos)
        nn.init.normal_(self.scene_emb.weight)

    def set_tau_s(self, tau: float) -> None:
        """Set the share of the measured spectrum in S, in [0, 1]; `net.tau_s = 0.7` does the same."""
        tau = number("tau_s", tau)
        if not 0 <= tau <= 1:
            raise ValueError(f"tau_s must lie in [0, 1], got {tau}")
        self.tau_s.fill_(tau)
        self._tau = tau

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LoMACSSVDNet:
        without = self.tau_s.is_meta
        super()._apply(fn, recurse)
        # a number and no weight: `to_empty` leaves it open and no state dict brings it
        if without and not self.tau_s.is_meta:
            self.tau_s.fill_(self._tau)
        return self

    def set_refine_steps(self, steps: int, active: int | None = None) -> None:
        """Refine by so many steps, and so many columns, from now on: accuracy against time.

        Beyond the trained number of steps the last step's scalars repeat. Fewer active columns leave more to
        the completion; None leaves their number as it is. At least 0 steps, and 1 to r columns; a network
        that was made without refinement stays without, and refuses other numbers.
        """
        steps = integer("refine_steps", steps, 0)
        if not hasattr(self, "refiner"):
            if steps or active is not None:
                raise ValueError(f"refine_steps must be 0 for a network without a refiner, got {steps}")
        elif active is not None and integer("active", active, 1) > self.r:
            raise ValueError(f"active must be at most r = {self.r}, got {active}")
        elif active is not None:
            self.refiner.active = active
        self.refine_steps = steps

    @property
    def trained_steps(self) -> int:
        """Steps that have scalars of their own."""
        return self.refiner.steps if hasattr(self, "refiner") else 0

    @property
    def like(self) -> Tensor:
        """A parameter: the network's precision and device."""
        return self.shrink if self.head == "angular" else self.pos

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "tau_s" and not isinstance(value, Tensor) and "tau_s" in self.__dict__.get("_buffers", ()):
            self.set_tau_s(value)
        else:
            super().__setattr__(name, value)

    @property
    def k_len(self) -> int | list[int]:
        """Rows of the reduced keys and values: one number, or one an attention block where they differ."""
        k_lens = [cast(int, cast(nn.Sequential, block)[1].k_len) for block in list(self.blocks)[::2]]
        return k_lens[0] if len(set(k_lens)) == 1 else k_lens

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: `type(net)(**net.config)` has the same architecture."""
        names = ["M", "N", "r", "n_scene", "dim", "depth", "groups", "kernel_size", "temperature"]
        if self.head == "angular":
            names = names[:4]
        values = {name: getattr(self, name) for name in names} | {"gate_hidden": self.gate_hidden}
        if self.head == "pooled":
            tau = self._tau if self.tau_s.is_meta else float(self.tau_s)
            values |= {"k_len": self.k_len, "tau_s": tau}
        if not hasattr(self, "refiner"):
            return values
        return values | {
            "refine_steps": self.refiner.steps,
            "head": self.head,
            "active": self.refiner.active,
            "array": self.array,
            "hermitian": self.hermitian,
        }

    def forward(self, H: Tensor, sid: Tensor | int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        H = self._complex_input(H)
        scene = self._scene_input(sid, H)
        if self.head == "angular":
            U, S, V, Hd = self._angular(H, scene)
        else:
            U, S, V, Hd = self._pooled(H, scene)
        parts = real_view(H).flatten(1)
        # most often the first number of every sample tells; a list of few costs less than a reduction
        if _readable(parts) and (all(parts.select(1, 0).tolist()) if len(parts) < FEW else parts[:, 0].all()):
            return U, S, V, Hd
        # a tenth of the time, and no copy, of asking every number
        alive = (parts.amax(-1, keepdim=True) != 0) | (parts.amin(-1, keepdim=True) != 0)
        return U, torch.where(alive, S, 0), V, Hd

    def _pooled(self, H: Tensor, scene: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        U, S, V, Hd = self._published(H, scene)
        if self.refine_steps:
            refiner, X = self.refiner, 0.5 * (Hd + Hd.mH) if self.hermitian else Hd
            options = {"active": refiner.active, "hermitian": self.hermitian, "scalars": refiner.scalars}
            U, S, V = self.functions.refine_svd(X, U, V, self.refine_steps, **options)
        return U, S, V, Hd

    def _published(self, H: Tensor, scene: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        at_once = getattr(self.functions, "svd_network_at_once", None)
        # a trace would ask in vain: it takes the parts
        apart = at_once is None or _launches(H) or torch.compiler.is_compiling()
        weights = None if apart else self._weights()
        if at_once is not None and weights is not None:
            found: tuple[Tensor, Tensor, Tensor, Tensor] | None = at_once(H, scene, self.tau_s, weights)
            if found is not None:
                return found
        return self._by_parts(H, scene)

    def _by_parts(self, H: Tensor, scene: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._check_scenes(scene)
        x, Hd = self._front(H)
        feat = self._backbone(x) + self.scene_emb(scene)
        # autocast gives half precision here; columns, spectrum and their order are full precision
        (u, v), s = self._columns(feat), self.s_head(feat).to(self.pos.dtype)
        U = self.complex_of(u.view(-1, self.M, self.r, 2))
        V = self.complex_of(v.view(-1, self.N, self.r, 2))
        return *self._tail(U, V, s + 1e-6, Hd), Hd

    def _weights(self) -> NetworkWeights | None:
        """All weights, where one call may stand for all modules; else None."""
        # past the lookup by name, which is felt at one sample
        m = cast(Any, self._modules)
        gate, project, last, scenes = m["freq_gate"], m["input_proj"], m["norm"], m["scene_emb"]
        u_head, v_head, s_head, refiner = m["u_head"], m["v_head"], m["s_head"], m["ortho_refine"]
        if not _as_written(s_head, nn.Sequential) or len(s_head) != 2:
            return None
        linear, softplus = s_head._modules.values()
        linears = project, u_head, v_head, linear
        written = (
            _as_written(gate, AxialLowRankFreqGate)
            and all(_as_written(one, nn.Linear) for one in linears)
            and _as_written(last, nn.LayerNorm)
            and last.normalized_shape == (self.dim,)
            and _as_written(softplus, nn.Softplus)
            and (softplus.beta, softplus.threshold) == SOFTPLUS
            and _as_written(scenes, nn.Embedding)
            and (scenes.padding_idx is scenes.max_norm is None)
            and not (scenes.sparse or scenes.scale_grad_by_freq)
            and _as_written(refiner, NeuralOrthoRefiner)
            and isinstance(refiner, self.modules_.NeuralOrthoRefiner)
            and type(refiner).steps is NeuralOrthoRefiner.steps
            and all(isinstance(x, int | float) for x in (refiner.max_scale, gate.temperature))
            # what a class of the user's calls in their place
            and all(getattr(type(self), name) is getattr(LoMACSSVDNet, name) for name in STEPS)
        )
        if not (written and _unhooked(gate, *linears, last, s_head, softplus, scenes, refiner)):
            return None
        blocks = self._block_weights(self.dim, last.eps)
        if blocks is None:
            return None
        # a parametrised weight is no parameter of its module
        values = [one._parameters.get(name) for one in (*linears, last) for name in ("weight", "bias")]
        values += [
            scenes._parameters.get("weight"),
            *(refiner._parameters.get(x) for x in ("a_raw", "b_raw")),
        ]
        if any(x is None for x in values) or values[-1].ndim or values[-2].ndim:
            return None
        if len(values[10]) != self.n_scene:
            return None
        return NetworkWeights(
            gate.weights,
            gate.temperature,
            (*values[:2], self.pos),
            blocks,
            (values[8], values[9]),
            last.eps,
            values[10],
            tuple(values[2:6]),
            (values[6], values[7]),
            (values[11], values[12]),
            refiner.max_scale,
        )

    def _columns(self, feat: Tensor) -> Sequence[Tensor]:
        heads = self.u_head, self.v_head
        written = all(_as_written(head, nn.Linear) and head.bias is not None for head in heads)
        # on a device the products are a library's
        if written and not _launches(feat) and _unhooked(*heads) and not autocast(feat.device.type):
            weights = (x for head in heads for x in (head.weight, head.bias))
            return cast(Sequence[Tensor], self.functions.svd_heads(feat, *weights))
        return [head(feat).to(self.pos.dtype) for head in heads]

    def _angular(self, H: Tensor, scene: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._check_scenes(scene)
        refiner, k, floor = self.refiner, self.refiner.active, None
        Hd = 0.5 * (H + H.mH) if self.hermitian else H
        if self.hermitian:
            Hd, floor = self.angular_gate(H, scene)
        U, V = dft_start(Hd, k)
        options = {"hermitian": self.hermitian, "scalars": refiner.scalars, "orthonormal": True}
        U, S, V = self.functions.refine_svd(Hd, U, V, self.refine_steps, **options)
        # a completion has S = 0, so no loss has a gradient there: it is left out of the graph
        rest = complete_from_dft(U, self.r)
        other = rest if self.hermitian else complete_from_dft(V, self.r)
        U, V = torch.cat([U, rest], -1), torch.cat([V, other], -1)
        S = S * self.shrink[0].exp()
        if floor is not None:
            S = S - self.shrink[1] * floor
        return U, nn.functional.pad(S.clamp_min(0), (0, self.r - k)), V, Hd

    def _backbone(self, x: Tensor) -> Tensor:
        blocks = self._inference_blocks(x)
        if blocks is not None:
            return self.functions.backbone(x, blocks, self.norm.weight, self.norm.bias, self.norm.eps)
        for block in self.blocks:
            x = _residual(block, x)
        return self.norm(x.mean(1))

    def _inference_blocks(self, x: Tensor) -> list[Block] | None:
        """The blocks as `backbone` takes them, where one call may stand for all modules; else None."""
        last = self.norm
        if torch.is_grad_enabled() or not _launches(x) or autocast(x.device.type):
            return None
        if not (_as_written(last, nn.LayerNorm) and _unhooked(last)) or last.normalized_shape != x.shape[-1:]:
            return None
        return self._block_weights(x.shape[-1], last.eps)

    def _block_weights(self, d: int, eps: float) -> list[Block] | None:
        found: list[Block] = []
        for block in self.blocks:
            parts = _parts(block, d)
            if parts is None:
                return None
            norm, mixer = parts
            # mixers that call other functions are called themselves
            kinds = GroupedProjectedAttention, GatedConv1D
            if cast(Any, type(mixer)).residual not in [kind.residual for kind in kinds]:
                return None
            if norm.eps != eps or norm.bias is None or mixer.functions is not self.functions:
                return None
            if isinstance(mixer, GroupedProjectedAttention):
                found.append(AttentionBlock(norm.weight, norm.bias, *mixer.weights))
            else:
                found.append(ConvBlock(norm.weight, norm.bias, *cast(GatedConv1D, mixer).weights))
        return found

    def _front(self, H: Tensor) -> tuple[Tensor, Tensor]:
        gate, project = self.freq_gate, self.input_proj
        written = _as_written(gate, AxialLowRankFreqGate) and _as_written(project, nn.Linear)
        if written and project.bias is not None and _unhooked(gate, project):
            return self.functions.gate_project(
                H, *gate.weights, gate.temperature, project.weight, project.bias, self.pos
            )
        Hf = torch.fft.fft2(H, norm="ortho")
        Hd = torch.fft.ifft2(Hf * gate(Hf), norm="ortho")
        return project(both_views(Hd)) + self.pos, Hd

    def _tail(self, U: Tensor, V: Tensor, S: Tensor, Hd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        refiner, f = self.ortho_refine, self.functions
        written = isinstance(refiner, self.modules_.NeuralOrthoRefiner)
        if written and _as_written(refiner, NeuralOrthoRefiner) and _unhooked(refiner):
            a, b = refiner.steps
            if a.ndim == 0:
                return f.svd_tail(U, V, S, Hd, a, b, self.tau_s)
        S, order = torch.sort(S, dim=-1, descending=True, stable=True)
        columns = order.unsqueeze(-2)
        U, V = (f.column_normalize(X).gather(-1, columns.expand_as(X)) for X in (U, V))
        U, V = refiner(U, V)
        return U, f.spectral_calibrate(U, Hd, V, S, self.tau_s), V

    def _complex_input(self, H: Tensor) -> Tensor:
        if not isinstance(H, Tensor):
            raise TypeError(
                f"H must be a tensor, complex (B, {self.M}, {self.N}) or real (B, {self.M}, {self.N}, 2), "
                f"got {type(H).__name__}"
            )
        if not H.is_complex():
            if H.ndim != 4 or H.shape[-1] != 2 or not H.is_floating_point():
                raise ValueError(
                    f"H must be complex (B, {self.M}, {self.N}) or real (B, {self.M}, {self.N}, 2), "
                    f"got {H.dtype} {tuple(H.shape)}"
                )
            H = torch.view_as_complex(H.contiguous())
        if H.ndim != 3 or H.shape[-2:] != (self.M, self.N):
            raise ValueError(f"H must have shape (B, {self.M}, {self.N}), got {tuple(H.shape)}")
        dtype = self.like.dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"the parameters must be float32 or float64 (torch.autocast runs the tokens in half "
                f"precision), got {dtype}"
            )
        wanted = torch.promote_types(dtype, torch.complex32)
        if H.dtype != wanted:
            raise TypeError(f"H must be {wanted} to go with {dtype} parameters, got {H.dtype}")
        return H

    def _scene_input(self, sid: Tensor | int, H: Tensor) -> Tensor:
        if not isinstance(sid, Tensor):
            sid = self._scene_number(sid)
            if not 0 <= sid < self.n_scene:
                raise ValueError(f"sid must lie between 0 and n_scene - 1 = {self.n_scene - 1}, got {sid}")
            return torch.full((H.shape[0],), sid, device=H.device)
        if sid.is_floating_point() or sid.is_complex() or sid.dtype == torch.bool:
            raise TypeError(f"sid must be an integer tensor, got {sid.dtype}")
        if sid.shape != H.shape[:1]:
            raise ValueError(f"sid must have shape ({H.shape[0]},) as H has, got {tuple(sid.shape)}")
        return sid

    def _check_scenes(self, scene: Tensor) -> None:
        if scene.device.type == "cpu" and not torch.compiler.is_compiling() and scene.numel():
            low, high = scene.aminmax()
            if low < 0 or high >= self.n_scene:
                raise ValueError(
                    f"sid must lie between 0 and n_scene - 1 = {self.n_scene - 1}, "
                    f"got values from {int(low)} to {int(high)}"
                )

    def _scene_number(self, sid: Any) -> int:
        # a traced integer stays what it is
        if isinstance(sid, int) and not isinstance(sid, bool):
            return sid
        try:
            return integer("sid", sid)
        except TypeError:
            came = type(sid).__name__
            raise TypeError(f"sid must be an integer or an integer tensor (B,), got {came}") from None


def replaced_parts(net: LoMACSSVDNet) -> list[str]:
    """Names of the parts of a network that are not those of its constructor: another kind or number of them,
    another `forward`, a bias or scale left out."""
    kinds: dict[str, type[nn.Module]] = {}
    if net.head == "angular":
        kinds |= {"angular_gate": AngularGate} if net.array is not None else {}
    else:
        kinds |= dict.fromkeys(("input_proj", "u_head", "v_head", "s_head.0"), nn.Linear)
        kinds |= {"freq_gate": AxialLowRankFreqGate, "norm": nn.LayerNorm, "scene_emb": nn.Embedding}
        kinds |= {"s_head": nn.Sequential, "s_head.1": nn.Softplus, "ortho_refine": NeuralOrthoRefiner}
        kinds["blocks"] = nn.ModuleList
        for i in range(net.depth):
            kinds |= {f"blocks.{i}": nn.Sequential, f"blocks.{i}.0": nn.LayerNorm}
            kinds[f"blocks.{i}.1"] = GatedConv1D if i % 2 else GroupedProjectedAttention
            if i % 2:
                kinds |= {f"blocks.{i}.1.dw": nn.Conv1d, f"blocks.{i}.1.pw": nn.Conv1d}

    def usual(name: str, kind: type[nn.Module]) -> bool:
        try:
            part = net.get_submodule(name)
        except AttributeError:
            return False
        if not _as_written(part, kind) or any(x is None for x in part._parameters.values()):
            return False
        if isinstance(part, nn.Sequential | nn.ModuleList):
            return len(part) == (net.depth if name == "blocks" else 2)
        if isinstance(part, nn.Softplus):
            return (part.beta, part.threshold) == (1, 20)
        return not isinstance(part, NeuralOrthoRefiner) or part.a_raw.ndim == 0

    return [name for name, kind in kinds.items() if not usual(name, kind)]
