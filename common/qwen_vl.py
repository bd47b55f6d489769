"""Qwen2.5-VL without its processor classes: prompt ids, image patches, RoPE positions, vision attention.

Images are squashed to one fixed size first, so all of a batch have the same patch grid. The numbers (mean, std, patch
14, merge 2, two frames) come from the checkpoint; tests compare with transformers' own image processor and RoPE."""

import functools
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import require
from common.checkpoint import read_json
from common.hub import load_weights, opening, read_tensors, unfilled

TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{images}{text}<|im_end|>\n"


@functools.lru_cache(maxsize=256)
def chat_text(tokenizer, image_token, images, text, answer=False):
    """One user turn of `images` places and `text`, through the chat template; `answer`: up to where it begins."""
    if tokenizer.chat_template is None:  # an older snapshot keeps it in the processor's files
        turn = TURN.format(images=f"<|vision_start|>{image_token}<|vision_end|>" * images, text=text)
        return turn + "<|im_start|>assistant\n" * answer
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    turn = [{"role": "user", "content": content}]
    turn = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=answer)
    places = turn.count(image_token)
    require(places == images, f"the chat template has {places} image places for {images} cameras: {turn!r}")
    return turn


@functools.lru_cache(maxsize=256)
def prompt_ids(tokenizer, text, image_token, places):
    """Token ids of chat_text(), every image expanded to its `places` tokens; a recording has few different texts."""
    return tokenizer(text.replace(image_token, image_token * places), add_special_tokens=False)["input_ids"]


def image_patches(images, mean, std, patch=14, merge=2, temporal=2):
    """(N, h, w, 3) uint8 -> (N * h/patch * w/patch, 3 * temporal * patch * patch) float32 as Qwen2VLImageProcessor: the
    merge x merge patches of a token together, a still image `temporal` times. `mean`, `std` (3, 1, 1) in 0..255."""
    x = (images.permute(0, 3, 1, 2).float() - mean) / std  # (N, 3, h, w)
    n, c, h, w = x.shape
    rows, columns = h // patch, w // patch
    x = x.reshape(n, c, rows // merge, merge, patch, columns // merge, merge, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (n, rows, columns, merge, merge, c, patch, patch)
    return x.unsqueeze(-3).expand(*x.shape[:6], temporal, patch, patch).reshape(n * rows * columns, -1)


def rope_positions(ids, image_token_id, grid):
    """Token ids of one row -> (3, L) int64 (time, row, column): text counts up; an image of `grid` = (rows, columns)
    tokens spans its grid, then moves on by its longer side. get_rope_index would synchronise the GPU once per image."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    out, position, i = np.zeros((3, len(ids)), np.int64), 0, 0
    while i < len(ids):
        if ids[i] == image_token_id:
            out[:, i : i + len(row)] = position + np.stack([np.zeros_like(row), row, column])
            i, position = i + len(row), position + max(grid)
        else:
            out[:, i], i, position = position, i + 1, position + 1
    return out


def pick_attention(choice, device, dtype):
    """attn_implementation "auto" -> flash_attention_2 if it runs here in `dtype`, else sdpa; explicit, it must run."""
    if choice not in ("auto", "flash_attention_2"):
        return choice
    try:  # try it: an installed flash_attn may be broken, or too new for the GPU, and never runs in fp32
        from flash_attn import flash_attn_func

        flash_attn_func(*torch.zeros(3, 1, 16, 1, 64, dtype=dtype, device=device))
        return "flash_attention_2"
    except Exception as error:
        require(choice == "auto", f"Flash Attention not supported here: {error!r}. Use --attn_implementation auto")
        return "sdpa"


def batch_vision_attention():
    """Patch transformers' vision tower: attend to all windows of one length in one call, as a batch dimension, and
    compute windows and positions once per grid. transformers loops over the windows unless flash attention is used
    (10,000 calls for 20 images of 616x336), and synchronises with the GPU to read their sizes. Same result. Pass
    grid_thw on the CPU: reading it from the GPU would be such a synchronisation."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    attention, tower = qwen.Qwen2_5_VLVisionAttention, qwen.Qwen2_5_VisionTransformerPretrainedModel
    if hasattr(attention, "looped_forward"):
        return
    attention.looped_forward, tower.plain_forward = attention.forward, tower.forward

    def attend(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
        if self.config._attn_implementation != "sdpa":
            return self.looped_forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        order, back, groups = _windows_by_length(tuple(cu_seqlens.tolist()), hidden_states.device)
        inputs = (hidden_states, *position_embeddings)
        x, cos, sin = (t.index_select(0, order) if len(groups) > 1 else t for t in inputs)
        q, k, v = self.qkv(x).reshape(len(x), 3, self.num_heads, -1).unbind(1)
        q, k = qwen.apply_rotary_pos_emb_vision(q, k, cos, sin)
        parts = [t.split([count * length for count, length in groups]) for t in (q, k, v)]
        out = []
        for (count, length), *qkv in zip(groups, *parts, strict=True):
            qkv = (t.reshape(count, length, self.num_heads, -1).transpose(1, 2) for t in qkv)  # (windows, heads, ...)
            attended = F.scaled_dot_product_attention(*qkv, scale=self.scaling)
            out.append(attended.transpose(1, 2).reshape(count * length, -1))
        out = self.proj(torch.cat(out))
        return out.index_select(0, back) if len(groups) > 1 else out

    def forward(self, hidden_states, grid_thw, **kwargs):
        where = "cpu" if self.config._attn_implementation == "sdpa" else hidden_states.device
        sizes = (self.spatial_merge_size, self.window_size, self.patch_size)
        plan = _vision_plan(tuple(map(tuple, grid_thw.tolist())), *sizes, hidden_states.device, where)
        return self.plain_forward(hidden_states, grid_thw, **plan, **kwargs)

    attention.forward, tower.forward = attend, forward


@functools.lru_cache(maxsize=16)
def _vision_plan(grid, merge, window, patch, device, where):
    """What the tower derives from the (time, rows, columns) of its images; the bounds of windows on `where`."""
    from transformers import vision_utils

    grid = torch.tensor(grid)
    order, bounds = vision_utils.get_vision_window_index(grid, merge, window, patch)
    positions, pictures = vision_utils.get_vision_position_ids(grid, merge), vision_utils.get_vision_cu_seqlens(grid)
    plan = dict(window_index=order.to(device), position_ids=positions.to(device))
    return plan | dict(cu_window_seqlens=bounds.to(where), cu_seqlens=pictures.to(where))


@functools.lru_cache(maxsize=16)
def _windows_by_length(bounds, device):
    """Bounds of windows -> (order of patches in which those of equal length lie together, its inverse, [(windows,
    length)])."""
    bounds, order, groups = np.array(bounds), [], []
    lengths = np.diff(bounds)
    for length in np.unique(lengths):
        starts = bounds[:-1][lengths == length]
        order.append((starts[:, None] + np.arange(length)).ravel())
        groups.append((len(starts), int(length)))
    order = torch.from_numpy(np.concatenate(order))
    return order.to(device), order.argsort().to(device), groups


def open_backbone(folder):
    """-> (config, tokenizer, image mean, image std) of a directory. The numbers are read from files: the image
    processor classes of some releases need torchvision."""
    from transformers import AutoConfig, AutoTokenizer

    with opening(folder):
        config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        chat_text(tokenizer, "<|image_pad|>", 0, "")  # reads the chat template
        paths = [Path(folder, f"{name}_config.json") for name in ("preprocessor", "processor")]
        about = read_json(paths[not paths[0].is_file()])  # the second is of the whole processor, by transformers 5
        mean, std = (about.get("image_processor", about)[key] for key in ("image_mean", "image_std"))
    require(config.model_type == "qwen2_5_vl", f"model '{folder}' is a {config.model_type}, not a qwen2_5_vl")
    return config, tokenizer, mean, std


def module_name(name):
    """Name of a tensor in a file -> in the model, which transformers 4.52 renamed."""
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", name)


def load_backbone(folder, dtype, attention, missing_ok=(), device="cpu"):
    """Qwen2.5-VL with all its weights from `folder`, but for names in `missing_ok`; one tensor at a time straight to
    `device`. None: the parameters stay on the meta device, for FSDP."""
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    batch_vision_attention()
    options = dict(dtype=dtype, attn_implementation=attention)
    vlm = unfilled(Qwen2_5_VLForConditionalGeneration._from_config, AutoConfig.from_pretrained(folder), **options)
    if device is not None:
        load_weights(vlm, read_tensors(folder), folder, module_name, missing_ok, device=device)
    return vlm.eval()
