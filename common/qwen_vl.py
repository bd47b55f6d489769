"""Qwen2.5-VL without torchvision and without its processor classes: image patches, rope positions, vision attention.

Every program here squashes images to one fixed size first, so all images of a batch have the same patch grid. The numbers (mean, std,
patch 14, merge 2, two frames) come from the checkpoint; tests compare with transformers' own image processor and rope code.
"""

import importlib.util

import numpy as np
import torch.nn.functional as F


def image_patches(images, mean, std, patch=14, merge=2, temporal=2):
    """(N, h, w, 3) uint8 -> (N * h/patch * w/patch, 3 * temporal * patch * patch) float32, in the order of Qwen2VLImageProcessor: the merge x merge
    patches of one token together. `mean`, `std` (3, 1, 1) in 0..255 units. A still image is repeated `temporal` times."""
    x = (images.permute(0, 3, 1, 2).float() - mean) / std  # (N, 3, h, w)
    n, c, h, w = x.shape
    rows, columns = h // patch, w // patch
    x = x.reshape(n, c, rows // merge, merge, patch, columns // merge, merge, patch).permute(
        0, 2, 5, 3, 6, 1, 4, 7
    )  # (n, rows, columns, merge, merge, c, patch, patch)
    return x.unsqueeze(-3).expand(*x.shape[:6], temporal, patch, patch).reshape(n * rows * columns, -1)


def rope_positions(ids, image_token_id, grid):
    """Token ids of one row -> (3, L) int64 positions (time, row, column): text counts up; an image of `grid` = (rows, columns) tokens spans
    its grid and then moves on by its longer side. Replaces get_rope_index, which synchronises the GPU once per image."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    out, position, i = np.zeros((3, len(ids)), np.int64), 0, 0
    while i < len(ids):
        if ids[i] == image_token_id:
            out[:, i : i + len(row)] = position + np.stack([np.zeros_like(row), row, column])
            i, position = i + len(row), position + max(grid)
        else:
            out[:, i], i, position = position, i + 1, position + 1
    return out


def pick_attention(choice, device):
    """attn_implementation "auto" -> flash_attention_2 where it can run, else sdpa; asking for flash where it cannot is an error."""
    can_flash = importlib.util.find_spec("flash_attn") is not None and device.type == "cuda"
    if choice == "flash_attention_2" and not can_flash:
        raise ValueError(
            "Flash Attention not supported here: it needs CUDA and the flash_attn package. Use --attn_implementation auto (sdpa where flash is missing)"
        )
    return choice if choice != "auto" else "flash_attention_2" if can_flash else "sdpa"


def batch_vision_attention():
    """Let the vision tower attend to all windows of equal size in one call. transformers loops over them (64 calls per layer at batch 16,
    224x224) unless flash attention is used; equal windows are simply a batch dimension. Same result."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    attention = qwen.Qwen2_5_VLVisionAttention
    if hasattr(attention, "looped_forward"):
        return
    attention.looped_forward = attention.forward

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
        n = len(cu_seqlens) - 1
        length = hidden_states.shape[0] // n
        if self.config._attn_implementation != "sdpa" or not bool((cu_seqlens[1:] - cu_seqlens[:-1] == length).all()):
            return self.looped_forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        q, k, v = self.qkv(hidden_states).reshape(n * length, 3, self.num_heads, -1).unbind(1)
        q, k = qwen.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (
            x.reshape(n, length, self.num_heads, -1).transpose(1, 2) for x in (q, k, v)
        )  # (windows, heads, length, head dim)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        return self.proj(out.transpose(1, 2).reshape(n * length, -1))

    attention.forward = forward
