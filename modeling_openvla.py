"""OpenVLA (Kim et al. 2024, arXiv 2406.09246) in plain modules, in one file: config, image processor, processor, model.

    image 224 x 224 -> DINOv2 | SigLIP, their second-to-last block -> (B, 256, 2176) -> projector -> (B, 256, D),
    put between BOS and the text of a Llama, which answers with one token per action dimension.

train_openvla_vamos.py trains this model and copies this file into every model it exports, where AutoProcessor and
AutoModelForImageTextToText find it with trust_remote_code=True. So it imports nothing but torch, transformers, numpy
and Pillow. Names and shapes of all tensors are those of openvla/openvla-7b.

Letters in shapes: B batch, P patches of the image, T text tokens, D width of the Llama, A action dims.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BatchFeature,
    ImageProcessingMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.modeling_outputs import CausalLMOutput

PATCH = 14
EMPTY_TOKEN = 29871  # Llama's "▁": the space between the prompt and the first action token
IGNORE = -100  # label of a position without loss
AUTO_MAP = {
    "AutoConfig": "modeling_openvla.OpenVLAConfig",
    "AutoModelForImageTextToText": "modeling_openvla.OpenVLAForActionPrediction",
    "AutoModelForVision2Seq": "modeling_openvla.OpenVLAForActionPrediction",  # its name in transformers 4
    "AutoProcessor": "modeling_openvla.PrismaticProcessor",
    "AutoImageProcessor": "modeling_openvla.PrismaticImageProcessor",
}
# sizes of the towers that config.timm_model_ids names; for others config.json has them as vision_sizes
TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": dict(embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4.0),
    "vit_so400m_patch14_siglip_224": dict(embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362),
}


def prompt_of(instruction):
    """The prompt of OpenVLA's training."""
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


class OpenVLAConfig(PretrainedConfig):
    """config.json of an OpenVLA directory; keys that are not listed here are preserved."""

    model_type = "openvla"

    def __init__(
        self,
        text_config=None,
        timm_model_ids=tuple(TOWERS),
        image_sizes=(224, 224),
        use_fused_vision_backbone=True,
        n_action_bins=256,
        norm_stats=None,
        pad_token_id=32000,
        pad_to_multiple_of=64,
        vision_sizes=None,
        **kwargs,
    ):
        if not isinstance(text_config, PretrainedConfig):
            # what the released config leaves out: the defaults of transformers at that time
            text = dict(rms_norm_eps=1e-6, max_position_embeddings=2048, rope_theta=10000.0, vocab_size=32064)
            text |= dict(pad_token_id=pad_token_id) | (text_config or {})
            text.pop("model_type", None)
            text_config = LlamaConfig(**text)
        self.text_config = text_config
        self.timm_model_ids, self.image_sizes = list(timm_model_ids), list(image_sizes)
        self.use_fused_vision_backbone, self.vision_sizes = use_fused_vision_backbone, vision_sizes
        self.n_action_bins, self.norm_stats, self.pad_to_multiple_of = n_action_bins, norm_stats, pad_to_multiple_of
        super().__init__(pad_token_id=pad_token_id, **kwargs | dict(tie_word_embeddings=False))

    def towers(self):
        """-> sizes {embed_dim, depth, num_heads, mlp_ratio} of the two towers"""
        if not self.use_fused_vision_backbone or len(self.timm_model_ids) != 2:
            raise ValueError(f"config.json: timm_model_ids are {self.timm_model_ids}; expected openvla-7b's two towers")
        if self.vision_sizes:
            return [self.vision_sizes[name] for name in ("featurizer", "fused_featurizer")]
        if unknown := [name for name in self.timm_model_ids if name not in TOWERS]:
            raise ValueError(f"config.json: the sizes of tower '{unknown[0]}' are unknown. Write them as vision_sizes")
        return [TOWERS[name] for name in self.timm_model_ids]

    @property
    def patches(self):
        height, width = self.image_sizes
        if height % PATCH or width % PATCH:
            raise ValueError(f"config.json: image_sizes {self.image_sizes} must be multiples of {PATCH}")
        return height * width // PATCH**2

    # the last ids of Llama's own vocabulary are the actions: 31744 .. 31999 for openvla-7b

    @property
    def action_end(self):
        return self.text_config.vocab_size - self.pad_to_multiple_of

    @property
    def action_begin(self):
        return self.action_end - self.n_action_bins

    def encode_actions(self, actions):
        """(..., A) array in [-1, 1] -> int64 ids; -1 is the last action id, +1 the first"""
        return self.action_end - np.digitize(np.clip(actions, -1, 1), np.linspace(-1, 1, self.n_action_bins))

    def decode_actions(self, ids):
        """int ids -> (..., A) float64, the centres of their bins"""
        edges = np.linspace(-1, 1, self.n_action_bins)
        centres = (edges[:-1] + edges[1:]) / 2
        return centres[np.clip(self.action_end - np.asarray(ids) - 1, 0, len(centres) - 1)]


# ---- image and text -> inputs ----------------------------------------------------------------------------------------


class PrismaticImageProcessor(ImageProcessingMixin):
    """Images -> pixel_values (B, 6, h, w): resized to the model's size (bicubic, aspect not kept), channels 0-2
    normalised for DINOv2, 3-5 for SigLIP. Needs neither torchvision, which calls the same Pillow resize, nor timm."""

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_resize_strategy="resize-naive",
        input_sizes=((3, 224, 224), (3, 224, 224)),
        means=((0.485, 0.456, 0.406), (0.5,) * 3),
        stds=((0.229, 0.224, 0.225), (0.5,) * 3),
        tvf_normalize_params=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if image_resize_strategy != "resize-naive":
            raise ValueError(f"image_resize_strategy is '{image_resize_strategy}'; expected openvla-7b's resize-naive")
        self.image_resize_strategy, self.input_sizes = image_resize_strategy, [list(size) for size in input_sizes]
        self.means, self.stds = [list(m) for m in means], [list(s) for s in stds]
        self.tvf_normalize_params = tvf_normalize_params
        # tvf_normalize_params of the released file are rounded, and they are what the model was trained with
        used = tvf_normalize_params or [dict(mean=m, std=s) for m, s in zip(means, stds, strict=True)]
        self._mean = np.array([value for tower in used for value in tower["mean"]], np.float32)
        self._std = np.array([value for tower in used for value in tower["std"]], np.float32)

    def to_dict(self):
        return {k: v for k, v in super().to_dict().items() if k not in ("_mean", "_std")}

    @property
    def size(self):
        """(height, width) that the model sees"""
        return tuple(self.input_sizes[0][1:])

    def resize(self, image):
        """PIL image or (h, w, 3) uint8 array of any size -> (height, width, 3) uint8 RGB"""
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        return np.array(image.convert("RGB").resize(self.size[::-1], Image.BICUBIC))

    def normalize(self, images):
        """(B, h, w, 3) uint8 tensor -> (B, 6, h, w) float32, on the tensor's device"""
        mean, std = (torch.from_numpy(v).to(images.device)[:, None, None] for v in (self._mean, self._std))
        return ((images.permute(0, 3, 1, 2).float() / 255).repeat(1, 2, 1, 1) - mean) / std

    def __call__(self, images, return_tensors="pt", **kwargs):
        images = images if isinstance(images, (list, tuple)) else [images]
        pixels = torch.from_numpy(np.stack([self.resize(image) for image in images]))
        return BatchFeature({"pixel_values": self.normalize(pixels)})


class PrismaticProcessor(ProcessorMixin):
    """processor(text, images) -> input_ids, attention_mask (B, T) padded on the right, pixel_values (B, 6, h, w)"""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class, tokenizer_class = "AutoImageProcessor", "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer)

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        """Read both halves from the files of a directory or hub id, the same way in every version of transformers."""
        names = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
        hub = {k: kwargs[k] for k in names if kwargs.get(k) is not None}
        settings = read_image_settings(path, **hub)
        for name in ("image_processor_type", "processor_class", "auto_map"):
            settings.pop(name, None)
        return cls(PrismaticImageProcessor(**settings), PreTrainedTokenizerFast.from_pretrained(path, **hub))

    def prompt_ids(self, instruction):
        """-> list of ids, from BOS to the empty token before the first action"""
        return [*self.tokenizer(prompt_of(instruction))["input_ids"], EMPTY_TOKEN]

    def __call__(self, text, images, return_tensors="pt", **kwargs):
        text, images = (x if isinstance(x, (list, tuple)) else [x] for x in (text, images))
        if len(text) != len(images):
            raise ValueError(f"{len(text)} prompts for {len(images)} images: expected one image per prompt")
        rows = [self.tokenizer(t)["input_ids"] for t in text]
        ids, mask = pad_right(rows, self.tokenizer.pad_token_id)
        return BatchFeature({"input_ids": ids, "attention_mask": mask, **self.image_processor(images)})


def read_image_settings(path, **kwargs):
    """The image processor's part of preprocessor_config.json, or of the processor_config.json of transformers 5."""
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "processor_config.json"):
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **kwargs)
        settings = json.loads(Path(file).read_text()) if file else {}
        if "input_sizes" in (settings := settings.get("image_processor", settings)):
            return settings
    raise FileNotFoundError(f"{path} has no preprocessor_config.json with OpenVLA's input_sizes")


def pad_right(rows, value):
    """Lists of ids -> (ids (B, T), mask (B, T)) int64"""
    ids = torch.full((len(rows), max(map(len, rows))), value)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return ids, mask


def side_by_side(prompts, answers, config):
    """Pack several answers behind one prompt; each attends to the prompt and to itself, as if it were alone. B lists of
    ids, B tensors (k, n) -> ids (B, T), padded on the right | answer (B, T): 0 in a prompt, 1 .. k in its answers |
    before (N, n): the position, in the flattened (B, P + T) hidden states, that predicts each token of each answer: the
    one before it, for the first token the prompt's last"""
    ids, _ = pad_right(
        [[*p, *a.flatten().tolist()] for p, a in zip(prompts, answers, strict=True)], config.pad_token_id
    )
    answer, before = torch.full_like(ids, -1), []
    for b, (prompt, (k, n)) in enumerate(zip(prompts, map(torch.Tensor.size, answers), strict=True)):
        start, token = len(prompt), torch.arange(n)
        answer[b, :start] = 0
        answer[b, start : start + k * n] = torch.arange(1, k + 1).repeat_interleave(n)
        behind = torch.where(token > 0, torch.arange(k)[:, None] * n + token, 0)
        before.append(b * (config.patches + ids.shape[1]) + config.patches + start - 1 + behind)
    return ids, answer, torch.cat(before)


# ---- model -----------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # the exact GELU, also where SigLIP's authors use the tanh form


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, P, head dim)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale_factor


class Block(nn.Module):
    def __init__(self, width, heads, hidden, scaled):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, hidden)
        self.ls1, self.ls2 = (LayerScale(width), LayerScale(width)) if scaled else (nn.Identity(), nn.Identity())

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, P, width), row by row


class AttentionPool(nn.Module):
    """SigLIP's pooling head: never run, here because the weight files contain it."""

    def __init__(self, width, hidden):
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, hidden)


class Tower(nn.Module):
    """One vision transformer. (B, 3, h, w) -> (B, P, embed_dim): the output of the second-to-last block, without prefix
    tokens and final norm. The last block, `norm` and `attn_pool` exist because the weight files contain them."""

    def __init__(self, patches, embed_dim, depth, num_heads, mlp_ratio, dino):
        super().__init__()
        hidden = int(embed_dim * mlp_ratio)
        if dino:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.reg_token = nn.Parameter(torch.zeros(1, 4, embed_dim))
        else:
            self.attn_pool = AttentionPool(embed_dim, hidden)
        self.dino, self.gradient_checkpointing = dino, False
        self.pos_embed, self.patch_embed = nn.Parameter(torch.zeros(1, patches, embed_dim)), PatchEmbed(embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, hidden, scaled=dino) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, x):
        x = self.patch_embed(x) + self.pos_embed
        if self.dino:  # prefix tokens get no position embedding
            prefix = torch.cat([self.cls_token, self.reg_token], dim=1)
            x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks[:-1]:
            x = checkpoint(block, x, use_reentrant=False) if self.gradient_checkpointing and self.training else block(x)
        return x[:, 5 if self.dino else 0 :]


class VisionBackbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patches, (dino, siglip) = config.patches, config.towers()
        self.featurizer = Tower(self.patches, **dino, dino=True)
        self.fused_featurizer = Tower(self.patches, **siglip, dino=False)

    def forward(self, pixel_values):
        """(B, 6, h, w) -> (B, P, both widths)"""
        return torch.cat([self.featurizer(pixel_values[:, :3]), self.fused_featurizer(pixel_values[:, 3:])], dim=2)


class Projector(nn.Module):
    def __init__(self, vision, text):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(vision, 4 * vision), nn.Linear(4 * vision, text), nn.Linear(text, text)

    def forward(self, x):
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class OpenVLAForActionPrediction(PreTrainedModel):
    config_class = OpenVLAConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["Block", "LlamaDecoderLayer"]
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = True
    supports_gradient_checkpointing = False  # see enable_checkpointing

    def __init__(self, config):
        super().__init__(config)
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(sum(size["embed_dim"] for size in config.towers()), config.text_config.hidden_size)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.action_begin, self.action_end = config.action_begin, config.action_end
        self.post_init()

    def _init_weights(self, module):
        """For a new model (demo, benchmark): std 0.02 everywhere; the towers' other parameters stay 0 or 1."""
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            return super()._init_weights(module)  # also fills Llama's rotary buffers, which are in no file
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def enable_checkpointing(self):
        """Recompute activations in the backward pass, block by block, in both towers and the Llama."""
        for tower in self.vision_backbone.children():
            tower.gradient_checkpointing = True
        llama = self.language_model
        enable = getattr(llama, "activation_checkpointing_enable", None)  # the old name warns
        (enable or llama.gradient_checkpointing_enable)({"use_reentrant": False})

    def embed(self, input_ids, pixel_values):
        """(B, T) ids, (B, 6, h, w) -> (B, P + T, D): BOS, the image, the text."""
        text = self.get_input_embeddings()(input_ids)
        pixels = pixel_values.to(self.vision_backbone.featurizer.pos_embed.dtype)
        image = self.projector(self.vision_backbone(pixels)).to(text.dtype)
        return torch.cat([text[:, :1], image, text[:, 1:]], dim=1)

    def hidden(self, input_ids, pixel_values, attention_mask=None, answer=None):
        """-> (B, P + T, D), last hidden states. Where padding is on the right, causal attention alone keeps it out of
        every real position: no mask is needed. With `answer` (B, T) of side_by_side a token sees the image, the prompt
        and its own answer."""
        embedded, llama, positions = self.embed(input_ids, pixel_values), self.language_model.model, None
        if answer is not None:
            if llama.config._attn_implementation not in ("sdpa", "eager"):
                problem = f"{llama.config._attn_implementation} has no mask for several answers behind one prompt"
                raise ValueError(f"{problem}: load with attn_implementation='sdpa', or train on one target per image")
            answer = F.pad(answer, (self.vision_backbone.patches, 0))
            seen = ((answer[:, None] == 0) | (answer[:, None] == answer[:, :, None])).tril()  # (B, P + T, P + T)
            positions = seen.sum(-1) - 1
            attention_mask = torch.zeros_like(seen, dtype=embedded.dtype).masked_fill(~seen, -torch.inf)[:, None]
        inputs = dict(inputs_embeds=embedded, attention_mask=attention_mask, position_ids=positions)
        return llama(**inputs, use_cache=False).last_hidden_state

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, labels=None, **kwargs):
        """Logits (B, P + T, V) at every position; with labels (B, T) the mean cross-entropy where they are not -100."""
        patches, loss = self.vision_backbone.patches, None
        if attention_mask is not None:  # the image is never masked
            image = attention_mask.new_ones(len(attention_mask), patches)
            attention_mask = torch.cat([attention_mask[:, :1], image, attention_mask[:, 1:]], dim=1)
        logits = self.language_model.lm_head(self.hidden(input_ids, pixel_values, attention_mask))
        if labels is not None:  # position P + j predicts token j + 1
            predicted = logits[:, patches:-1].flatten(0, 1).float()
            loss = F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=IGNORE)
        return CausalLMOutput(loss=loss, logits=logits)

    # ---- actions

    def stats_of(self, unnorm_key=None):
        """-> (key, statistics of its actions {q01, q99, mask, ...}); a name with and without _dataset mean the same"""
        known = self.config.norm_stats or {}
        if unnorm_key is None and len(known) == 1:
            return next(iter(known)), next(iter(known.values()))["action"]
        for key in (unnorm_key, f"{unnorm_key}_dataset", str(unnorm_key).removesuffix("_dataset")):
            if key in known:
                return key, known[key]["action"]
        names = ", ".join(sorted(known)) or "no data set"
        raise ValueError(f"unnorm_key is {unnorm_key!r}; this model has statistics of: {names}")

    def unnormalize(self, values, stats):
        """(..., A) in [-1, 1] -> float64 in the data's units; a dimension whose mask is False passes"""
        low, high = np.array(stats["q01"], np.float64), np.array(stats["q99"], np.float64)
        mask = np.array(stats.get("mask", np.ones(len(low))), bool)
        return np.where(mask, 0.5 * (np.asarray(values, np.float64) + 1) * (high - low) + low, values)

    def action_logits(self, hidden):
        """(B, D) -> logits of the action ids (B, bins), in fp32 whatever the autocast: in bf16 neighbouring bins tie,
        and argmax, which takes the first, would always answer the larger velocity."""
        head, bins = self.language_model.lm_head, slice(self.action_begin, self.action_end)
        # an adapter on the head comes along: of each parameter the rows of the bins, if it has a row per token
        rows = {n: (p[bins] if len(p) == head.out_features else p).float() for n, p in head.named_parameters()}
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.func.functional_call(head, rows, hidden.float())

    @torch.no_grad()
    def generate_action_ids(self, prompts, pixel_values, dims):
        """B lists of ids, with or without the empty token, (B, 6, h, w) -> greedy answers (B, dims), chosen among the
        action ids only: any other token would decode to full speed."""
        llama, patches = self.language_model.model, self.vision_backbone.patches
        rows = [row if row[-1] == EMPTY_TOKEN else [*row, EMPTY_TOKEN] for row in prompts]
        ids, mask = (x.to(pixel_values.device) for x in pad_right(rows, self.config.pad_token_id))
        rows, length = torch.arange(len(ids), device=ids.device), mask.sum(1)
        # no mask here: what comes before a prompt's last token is never padding
        out = llama(inputs_embeds=self.embed(ids, pixel_values), use_cache=True)
        last, chosen = out.last_hidden_state[rows, patches + length - 1], []
        mask = torch.cat([mask.new_ones(len(ids), patches), mask], dim=1)
        while True:
            chosen.append(self.action_begin + self.action_logits(last).argmax(-1))
            if len(chosen) == dims:
                return torch.stack(chosen, dim=1)
            # padding sits between a short prompt and its answer: masked, and not counted by the positions
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
            out = llama(
                inputs_embeds=self.get_input_embeddings()(chosen[-1])[:, None],
                attention_mask=mask,
                past_key_values=out.past_key_values,
                use_cache=True,
                position_ids=(patches + length + len(chosen) - 1)[:, None],
            )
            last = out.last_hidden_state[:, -1]

    def predict_action(self, input_ids=None, unnorm_key=None, pixel_values=None, attention_mask=None, do_sample=False):
        """Prompt and image(s) of the processor -> float64 array (A,) in the data's units, (B, A) for B > 1 rows. The
        action's dimension is that of the statistics."""
        if do_sample:
            raise ValueError("do_sample is True: actions are chosen greedily, write do_sample=False")
        _, stats = self.stats_of(unnorm_key)
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[m.bool()].tolist() for row, m in zip(input_ids, keep, strict=True)]
        ids = self.generate_action_ids(prompts, pixel_values, len(stats["q01"]))
        actions = self.unnormalize(self.config.decode_actions(ids.cpu().numpy()), stats)
        return actions[0] if len(actions) == 1 else actions
