"""Block-causal attention over a video: a frame attends to itself and all frames before, in constant memory.

The state of the frames so far is one (D + 1) x (D + 1) matrix a head, whatever their number. Run it:
python examples/video.py
"""

import torch

from flatten_ext import attention, attention_from_state, attention_state, reference


def block_causal(q, k, v, num_heads):
    """(B, frames, tokens, C) each -> the same, frame by frame as they come."""
    state, out = 0, []
    for q_frame, k_frame, v_frame in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
        state = state + attention_state(k_frame, v_frame, num_heads)
        out.append(attention_from_state(q_frame, state, num_heads))
    return torch.stack(out, 1)


def masked(q, k, v, num_heads, eps=1e-6):
    """The same by its formula: all scores, and a mask."""
    frames, tokens = q.shape[1:3]
    phi = [reference.focus(x.flatten(1, 2)).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k)]
    mask = torch.ones(frames, frames).tril().repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    scores = phi[0] @ phi[1].mT * mask / mask.sum(1, keepdim=True)
    values = v.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    out = (scores @ values) / (scores.sum(-1, keepdim=True) + eps)
    return out.transpose(1, 2).reshape(v.shape)


if __name__ == "__main__":
    q, k, v = torch.randn(3, 2, 6, 7 * 9, 32, dtype=torch.float64)  # two videos of six frames of 7 x 9 tokens
    out = block_causal(q, k, v, num_heads=4)
    torch.testing.assert_close(out, masked(q, k, v, num_heads=4), rtol=1e-10, atol=1e-10)
    last = attention(q[:, -1], k.flatten(1, 2), v.flatten(1, 2), 4)  # the last frame sees all of them
    torch.testing.assert_close(out[:, -1], last, rtol=1e-10, atol=1e-10)
    print("equal to the masked formula:", tuple(out.shape))
