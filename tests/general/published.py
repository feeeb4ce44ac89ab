"""The cores of published linear attentions as calls of the general operator, on their recorded numbers.

A core is what lies between a module's projections. What the public modules
computed in float64 is in tests/golden/{mlla,rala,mala,inline,pola,evit,agent}_*, at these commits:

    MLLA          LeapLabTHU/MLLA 66b6d29             PolaFormer    ZacharyMeng/PolaFormer 44cdd39
    RALA          qhfan/RALA a86314f                  EfficientViT  mit-han-lab/efficientvit de7d773
    MALA          qhfan/MALA 7114e63                  Agent         LeapLabTHU/Agent-Attention 207ce3e
    InLine        LeapLabTHU/InLine e463a6f

`mid.<layer>.out` and `mid.<layer>.in` are outputs and inputs of a module's layers, `gmid.*` their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from golden_data import Golden
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Core:
    """One published attention.

    reads: the keys of the tensors it starts from, each with a recorded gradient.
    result: the key of what it computes.
    call: (operators, golden, tensors by key) -> that, with one call of an operator (PolaFormer: two).
        "rotary" among the tensors replaces the recorded table, which was made in float32.
    """

    cases: tuple[str, ...]
    reads: Callable[[Golden], list[str]]
    result: Callable[[Golden], str]
    call: Callable[[Any, Golden, Tensors], Tensor]


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return x.flatten(2).transpose(1, 2)


def elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def table_of_thetas(theta: Tensor, size: list[int]) -> Tensor:
    """(H*W, 2n, 2) of n angles a step: row * theta, then column * theta."""
    row = torch.arange(size[0], dtype=torch.float64).repeat_interleave(size[1])
    column = torch.arange(size[1], dtype=torch.float64).repeat(size[0])
    angle = torch.cat((row[:, None] * theta, column[:, None] * theta), 1)
    return torch.stack((angle.cos(), angle.sin()), -1)


def size_of(golden: Golden) -> list[int]:
    return [golden.meta["H"], golden.meta["W"]]


# MLLA: v is the input itself, the rotation runs over all channels, LePE is 3x3.


def mlla(operators, golden: Golden, x: Tensors) -> Tensor:
    q, k = x["mid.qk.out"].chunk(2, -1)
    return operators.attention(
        q, k, golden["in.x"], golden.meta["heads"], feature_map="elu", size=size_of(golden),
        rotary=x.get("rotary", golden["param.rope.rotations"].flatten(0, 1)),
        dwc_weight=x["param.lepe.weight"], dwc_bias=x["param.lepe.bias"],
    )  # fmt: skip


def mlla_block(operators, golden: Golden, x: Tensors) -> Tensor:
    """The attention of a block and its SiLU gate, which lies outside the public attention module."""
    u, size = x["mid.attn.in"], size_of(golden)
    image = golden["in.x"]
    cpe = F.conv2d(
        image.transpose(1, 2).unflatten(2, size), golden["param.cpe1.weight"], golden["param.cpe1.bias"],
        padding=1, groups=image.shape[-1],
    )  # fmt: skip
    t = F.layer_norm(
        image + tokens(cpe), image.shape[-1:], golden["param.norm1.weight"], golden["param.norm1.bias"]
    )
    q, k = F.linear(u, golden["param.attn.qk.weight"], golden["param.attn.qk.bias"]).chunk(2, -1)
    return operators.attention(
        q, k, u, golden.meta["heads"], feature_map="elu", size=size,
        rotary=golden["param.attn.rope.rotations"].flatten(0, 1),
        dwc_weight=x["param.attn.lepe.weight"], dwc_bias=x["param.attn.lepe.bias"],
        gate=F.linear(t, x["param.act_proj.weight"], x["param.act_proj.bias"]), gate_activation="silu",
    )  # fmt: skip


# RALA and MALA: the same angles in every head, LePE 5x5, a linear gate.


def _prefix(golden: Golden) -> str:
    return "m.attn." if golden.meta["kind"] == "block" else "m."


def _lepe_reads(golden: Golden) -> list[str]:
    p = _prefix(golden)
    return [f"mid.{p}qkvo.out", f"param.{p}lepe.weight", f"param.{p}lepe.bias"]


def _rala_like(golden: Golden, x: Tensors) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    qkvo, lepe_weight, lepe_bias = (x[key] for key in _lepe_reads(golden))
    q, k, v, gate = tokens(qkvo).chunk(4, -1)
    size = size_of(golden)
    common = {
        "feature_map": "elu", "gate": gate, "size": size, "dwc_weight": lepe_weight, "dwc_bias": lepe_bias,
        "rotary": x.get("rotary", table_of_thetas(golden["param.RoPE.angle"][::2], size)),
    }  # fmt: skip
    return q, k, v, common


def _as_image(golden: Golden, out: Tensor) -> Tensor:
    return out.transpose(1, 2).unflatten(2, size_of(golden))


def rala(operators, golden: Golden, x: Tensors) -> Tensor:
    q, k, v, common = _rala_like(golden, x)
    heads = golden.meta["heads"]
    feature_q, feature_k = (elu(t).unflatten(-1, (heads, -1)) for t in (q, k))
    logits = (feature_q.mean(1, keepdim=True) * feature_k).sum(-1) * feature_k.shape[-1] ** -0.5
    weight = logits.softmax(1)  # (B, M, heads): the importance of a key
    return _as_image(golden, operators.attention(q, k, v, heads, key_weight=weight, **common))


def mala(operators, golden: Golden, x: Tensors) -> Tensor:
    q, k, v, common = _rala_like(golden, x)
    heads = golden.meta["heads"]
    scale = (q.shape[-1] // heads) ** -0.5
    out = operators.attention(q, k, v, heads, normalizer="magnitude", similarity_scale=scale, **common)
    return _as_image(golden, out)


# InLine: signed features, weights that sum to 1 by subtraction, taps of each image's own.


def _qkv_reads(*more: str) -> Callable[[Golden], list[str]]:
    def reads(golden: Golden) -> list[str]:
        separate = golden.meta["family"] == "pvt"
        return [*(["mid.q.out", "mid.kv.out"] if separate else ["mid.qkv.out"]), *more]

    return reads


def _qkv(x: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    if "mid.qkv.out" in x:
        q, k, v = x["mid.qkv.out"].chunk(3, -1)
    else:
        q, (k, v) = x["mid.q.out"], x["mid.kv.out"].chunk(2, -1)
    return q, k, v


def inline(operators, golden: Golden, x: Tensors) -> Tensor:
    q, k, v = _qkv(x)
    heads = golden.meta["heads"]
    common = {
        "normalizer": "subtract", "similarity_scale": (q.shape[-1] // heads) ** -0.5, "size": size_of(golden),
        "dwc_weight": x["mid.residual.out"].reshape(*v.shape[::2], 1, 3, 3),
    }  # fmt: skip
    kernel = golden.meta.get("kernel_func", "identity")
    if kernel == "exp":  # a map that attention has not
        return operators.linear_attention((0.2 * q).exp(), (0.2 * k).exp(), v, heads, **common)
    feature_map = {"identity": "none", "relu": "relu"}[kernel]
    return operators.attention(q, k, v, heads, feature_map=feature_map, **common)


def inline_cswin(operators, golden: Golden, x: Tensors) -> Tensor:
    """LePE's kernel, which images share, joins the taps of each image; its bias stays outside."""
    q, k, v = _qkv(x)
    heads, p = golden.meta["heads"], "param.attns.0."
    mean = golden["in.x"].mean(1)[..., None]
    hidden = F.gelu(F.conv1d(mean, x[f"{p}residual.0.weight"], x[f"{p}residual.0.bias"], groups=heads))
    taps = F.conv1d(hidden, x[f"{p}residual.2.weight"], x[f"{p}residual.2.bias"], groups=heads)
    taps = taps.reshape(*v.shape[::2], 1, 3, 3) + x[f"{p}get_v.weight"]
    out = operators.attention(
        q, k, v, heads, feature_map="none", normalizer="subtract", size=size_of(golden), dwc_weight=taps,
        similarity_scale=(q.shape[-1] // heads) ** -0.5,
    )  # fmt: skip
    return out + x[f"{p}get_v.bias"]


# PolaFormer: positive and negative parts side by side, 2d wide; half of v's channels see like signs, half
# unlike ones.


def _pola_reads(golden: Golden) -> list[str]:
    layers = ["qg", "kv"] if golden.meta["family"] == "pvt" else ["qkvg"]
    parameters = ["power", "scale", "positional_encoding", "dwc.weight", "dwc.bias"]
    return [f"mid.{layer}.out" for layer in layers] + [f"param.{name}" for name in parameters]


def pola(operators, golden: Golden, x: Tensors) -> Tensor:
    heads, size = golden.meta["heads"], size_of(golden)
    if "mid.qkvg.out" in x:
        q, k, v, gate = x["mid.qkvg.out"].chunk(4, -1)
    else:
        (q, gate), (k, v) = x["mid.qg.out"].chunk(2, -1), x["mid.kv.out"].chunk(2, -1)
    scale = F.softplus(x["param.scale"])
    power = 1 + golden.meta["alpha"] * x["param.power"].sigmoid().flatten(-2).squeeze(0).flatten()
    power = power.unflatten(0, (heads, -1))

    def by_head(t: Tensor) -> Tensor:
        return t.unflatten(-1, (heads, -1))

    def halves(t: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.flatten(-2) for part in by_head(t).chunk(2, -1))

    q, k = by_head(q / scale), by_head((k + x["param.positional_encoding"]) / scale)
    (qa, qb), (ka, kb) = ((t.relu() ** power, (-t).relu() ** power) for t in (q, k))
    same, unlike, key = (torch.cat(pair, -1).flatten(-2) for pair in ((qa, qb), (qb, qa), (ka, kb)))
    weight, bias = x["param.dwc.weight"], x["param.dwc.bias"]
    if k.shape[1] == q.shape[1]:  # the taps, which the heads share, and the gate go with the halves
        outs = [
            operators.linear_attention(feature, key, part, heads, w, b, size, gate=g)
            for feature, part, w, b, g in zip(
                (same, unlike), halves(v), weight.chunk(2), bias.chunk(2), halves(gate), strict=True
            )
        ]
        return torch.cat([by_head(out) for out in outs], -1).flatten(-2)
    outs = [
        operators.linear_attention(f, key, part, heads)
        for f, part in zip((same, unlike), halves(v), strict=True)
    ]
    v = F.interpolate(v.transpose(1, 2), size=q.shape[1], mode="linear").transpose(1, 2)
    out = torch.cat([by_head(out) for out in outs], -1).flatten(-2)
    return (out + operators.depthwise_conv(v, weight, bias, size)) * gate


# EfficientViT: plain ReLU features; the scales are further heads. Its eps belongs to sums, ours to means.


def _evit_reads(golden: Golden) -> list[str]:
    scales = range(len(golden.meta["scales"]))
    return ["mid.qkv.conv.out", *(f"param.aggreg.{i}.{j}.weight" for i in scales for j in (0, 1))]


def evit(operators, golden: Golden, x: Tensors) -> Tensor:
    qkv = x["mid.qkv.conv.out"]
    branches = [qkv]
    for i, scale in enumerate(golden.meta["scales"]):
        local = F.conv2d(qkv, x[f"param.aggreg.{i}.0.weight"], padding=scale // 2, groups=qkv.shape[1])
        groups = 3 * (qkv.shape[1] // (3 * golden.meta["dim"]))
        branches.append(F.conv2d(local, x[f"param.aggreg.{i}.1.weight"], groups=groups))
    of_heads = tokens(torch.cat(branches, 1)).unflatten(-1, (-1, 3, golden.meta["dim"]))
    q, k, v = (t.flatten(-2) for t in of_heads.unbind(-2))
    out = operators.attention(q, k, v, of_heads.shape[2], feature_map="relu", eps=1e-15 / q.shape[1])
    return _as_image(golden, out)


# Agent: behind two softmaxes, queries and keys are weights over agents; the mean over keys is scaled back to
# a sum.


def _agent_reads(golden: Golden) -> list[str]:
    biases = ["an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias"]
    if golden.meta["family"] == "deit":
        biases += ["ac_bias", "ca_bias"]
    layers = _qkv_reads()(golden)
    return [*layers, *(f"param.{name}" for name in biases), "param.dwc.weight", "param.dwc.bias"]


def agent(operators, golden: Golden, x: Tensors) -> Tensor:
    q, k, v = _qkv(x)
    heads, agents = golden.meta["heads"], golden.meta["agents"]
    size, sr = size_of(golden), golden.meta.get("sr", 1)
    key_size = [n // sr for n in size]
    prefix = q.shape[1] - size[0] * size[1]
    side = int(agents**0.5)
    pooled = F.adaptive_avg_pool2d(q[:, prefix:].transpose(1, 2).unflatten(2, size), (side, side))
    by_head = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, tokens(pooled))]
    queries, keys, middle = by_head
    scale = queries.shape[-1] ** -0.5

    def resized(bias: Tensor, to: list[int]) -> Tensor:
        return F.interpolate(bias, size=to, mode="bilinear").flatten(2)

    of_keys = resized(x["param.an_bias"], key_size) + (x["param.ah_bias"] + x["param.aw_bias"]).flatten(-2)
    along_axes = (x["param.ha_bias"] + x["param.wa_bias"]).flatten(2, 3)
    of_queries = resized(x["param.na_bias"], size).mT + along_axes
    if prefix:
        of_keys = torch.cat((x["param.ac_bias"], of_keys), -1)
        of_queries = torch.cat((x["param.ca_bias"], of_queries), -2)
    gather = (scale * middle @ keys.mT + of_keys).softmax(-1)  # (B, heads, agents, M)
    spread = (scale * queries @ middle.mT + of_queries).softmax(-1)  # (B, heads, N, agents)
    features = [t.transpose(1, 2).flatten(-2) for t in (spread, gather.mT)]
    weight, bias = x["param.dwc.weight"], x["param.dwc.bias"]
    plain = {"normalizer": "none", "similarity_scale": float(k.shape[1])}
    if sr == 1:
        return operators.linear_attention(*features, v, heads, weight, bias, size, **plain)
    out = operators.linear_attention(*features, v, heads, **plain)
    v = tokens(F.interpolate(v.transpose(1, 2).unflatten(2, key_size), size=size, mode="bilinear"))
    return out + operators.depthwise_conv(v, weight, bias, size)


def _constant(*keys: str) -> Callable[[Golden], list[str]]:
    return lambda golden: list(keys)


def _lepe_result(golden: Golden) -> str:
    return f"mid.{_prefix(golden)}proj.in"


def _projected(golden: Golden) -> str:
    return "mid.proj.in"


CORES = {
    "MLLA": Core(
        ("mlla_m01", "mlla_m02_straddle", "mlla_m03_nobias", "mlla_m04_eps"),
        _constant("mid.qk.out", "param.lepe.weight", "param.lepe.bias"), lambda golden: "out.y", mlla,
    ),
    "MLLA block": Core(
        ("mlla_b01",),
        _constant(
            "mid.attn.in", "param.attn.lepe.weight", "param.attn.lepe.bias",
            "param.act_proj.weight", "param.act_proj.bias",
        ), lambda golden: "mid.out_proj.in", mlla_block,
    ),
    "RALA": Core(
        ("rala_m01", "rala_m02_rect", "rala_m03_peak", "rala_m04_d4", "rala_m05_eps"),
        _lepe_reads, _lepe_result, rala,
    ),
    "MALA": Core(
        ("mala_m01", "mala_m02_rect", "mala_m03_peak", "mala_m04_d4", "mala_m05_eps"),
        _lepe_reads, _lepe_result, mala,
    ),
    "InLine": Core(
        (
            "inline_m01_swin", "inline_m02_swin_relu", "inline_m03_swin_exp", "inline_m04_pvt_rect",
            "inline_m06_deit",
        ), _qkv_reads("mid.residual.out"), _projected, inline,
    ),
    "InLine CSwin block": Core(
        ("inline_b01_cswin",),
        _qkv_reads(*(
            f"param.attns.0.{name}.{kind}"
            for name in ("residual.0", "residual.2", "get_v") for kind in ("weight", "bias")
        )), _projected, inline_cswin,
    ),
    "PolaFormer": Core(
        (
            "pola_m01_swin", "pola_m02_swin_k3_a2", "pola_m03_swin_deadq", "pola_m05_pvt_rect",
            "pola_m06_pvt_sr2", "pola_m08_swin_eps",
        ), _pola_reads, _projected, pola,
    ),
    "EfficientViT": Core(
        ("evit_m01", "evit_m02_scales35", "evit_m03_quadratic", "evit_m05_deadq"),
        _evit_reads, lambda golden: "mid.proj.conv.in", evit,
    ),
    "Agent": Core(
        ("agent_m01_swin", "agent_m02_swin_up", "agent_m04_pvt", "agent_m05_pvt_sr2", "agent_m06_deit"),
        _agent_reads, _projected, agent,
    ),
}  # fmt: skip
CASES = [(method, case) for method, core in CORES.items() for case in core.cases]


def errors(operators, method: str, case: str) -> dict[str, float]:
    """The largest difference of the result and of each gradient, relative to the largest recorded number.

    A gradient that is rounding noise is measured by 1e-6 of the case's largest gradient.
    """
    core, golden = CORES[method], Golden(case)
    result = core.result(golden)
    leaves = {key: golden[key].clone().requires_grad_() for key in core.reads(golden)}
    out = core.call(operators, golden, leaves)
    upstream = golden["in.dy"] if result == "out.y" else golden["g" + result]
    found = torch.autograd.grad(out, list(leaves.values()), upstream)
    recorded = {
        key: golden[key.replace("param.", "grad.") if "param." in key else "g" + key] for key in leaves
    }
    largest = max(float(value.abs().max()) for value in recorded.values())
    measured = {"result": float((out.detach() - golden[result]).abs().max() / golden[result].abs().max())}
    for (key, expected), gradient in zip(recorded.items(), found, strict=True):
        of = expected.abs().max().clamp_min(1e-6 * largest)
        measured[key] = float((gradient - expected).abs().max() / of)
    return measured
