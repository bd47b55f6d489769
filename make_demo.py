"""Write small data sets in every recording format, and tiny random backbones in their real file formats.

The insertion episodes show one seeded scene: a needle tip approaches a trocar on an eye phantom, lines up with it and
enters. It is rendered by pinhole projection into side, tool and top cameras under domain randomisation (light, camera,
colours, background, noise: guide 2). Only the images show where the trocar is, and therefore what to do next; the frame
number does not help. The other formats have small scenes of their own, each made so that the action can only be known
from the inputs that its policy should use (image, instruction, force).

    python make_demo.py                                   # everything, below demo/
    python make_demo.py insertion --episodes 12           # only the insertion episodes
    python make_demo.py --list                            # what can be made

Everything is a function of --seed: two runs write the same scenes.
"""

import argparse
import functools
import io
import json
import multiprocessing
import os
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import h5py
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

# ---- scene -----------------------------------------------------------------------------------------------------------
# World frame: mm, z up, the phantom's centre near the origin. ee_pose = needle tip x y z (mm) and roll pitch yaw (rad);
# the needle points along R(roll, pitch) @ (0, 0, -1), yaw turns it about its own axis, which cannot be seen.

HZ = 14.9  # the simulator's frame rate: a frame every 67 physics steps of 1 ms
ALIGN_MM, ALIGN_RAD = 3.0, 0.06  # largest motion of one frame while aligning
INSERT_MM = 1.6  # advance of one frame while inserting
STANDOFF_MM, DEPTH_MM = 8.0, 9.0  # where inserting starts above the entry, and where it ends below it
INSTRUCTION = "Insert the needle into the target point"
SUPERSAMPLE = 2  # drawn at twice the size, then reduced: cheap antialiasing
CAMERAS = {  # name: (position mm, looks at mm, focal length in image heights)
    "side_camera": ((0.0, -150.0, 28.0), (0.0, 0.0, 14.0), 1.7),
    # rides on the stage: relative to the tip, does not tilt with it
    "tool_camera": ((0.0, -62.0, 70.0), (0.0, 4.0, 0.0), 0.85),
    "top_camera": ((0.0, -8.0, 165.0), (0.0, 0.0, 8.0), 1.8),
}


def needle_axis(pose):
    """Unit vector from the tip along the direction of insertion, (3,)."""
    roll, pitch = pose[3], pose[4]
    return np.array([-np.sin(pitch) * np.cos(roll), np.sin(roll), -np.cos(pitch) * np.cos(roll)])


def simulate(rng):
    """One episode -> dict(pose (N, 6) mm/rad, phase (N,) 1 align 2 insert 3 hold, entry (3,) mm)."""
    entry = np.array([rng.uniform(-16, 16), rng.uniform(-16, 16), rng.uniform(2, 8)])
    target = entry + [0, 0, STANDOFF_MM]
    xy, z = target[:2] + rng.uniform(-24, 24, 2), target[2] + rng.uniform(2, 22)
    pose = np.array([*xy, z, *rng.uniform(-0.45, 0.45, 2), rng.uniform(-1, 1)])
    poses, phases, phase, held = [], [], 1, 0
    while held < 4:
        poses.append(pose.copy())
        phases.append(phase)
        if phase == 1:
            gap = target - pose[:3]
            pose[:3] += gap * min(0.3, ALIGN_MM / max(np.linalg.norm(gap), 1e-9))
            pose[3:5] -= np.clip(0.3 * pose[3:5], -ALIGN_RAD, ALIGN_RAD)
            if np.linalg.norm(gap) < 0.4 and np.abs(pose[3:5]).max() < 0.02:
                phase = 2
        elif phase == 2:
            goal = entry - [0, 0, DEPTH_MM]
            pose[:3] += (goal - pose[:3]) * min(1.0, INSERT_MM / max(np.linalg.norm(goal - pose[:3]), 1e-9))
            if np.linalg.norm(goal - pose[:3]) < 1e-6:
                phase = 3
        else:
            held += 1
    return dict(pose=np.array(poses), phase=np.array(phases, np.int32), entry=entry)


def randomise(rng, size):
    """Domain randomisation of one episode: light, camera jitter and tilt, colours, and the painted backgrounds."""
    height, width = size
    ys, xs = np.mgrid[-1 : 1 : height * SUPERSAMPLE * 1j, -1 : 1 : width * SUPERSAMPLE * 1j].astype(np.float32)
    look = dict(light=rng.uniform(0.85, 1.15), jitter=rng.uniform(-2, 2, (3, 3)))
    look |= dict(tilt=rng.uniform(-0.02, 0.02, (3, 2)), color=rng.uniform(-0.1, 0.1, (4, 3)), mats=[])
    for _ in CAMERAS:  # a colour-graded table mat: red rises to the right, blue to the bottom
        base = np.array([0.45, 0.4, 0.45]) + rng.uniform(-0.05, 0.05, 3)
        dx = [0.3, 0.0, 0.0] + rng.uniform(-0.04, 0.04, 3)
        dy = [0.0, 0.0, 0.3] + rng.uniform(-0.04, 0.04, 3)
        mat = base + xs[..., None] * dx + ys[..., None] * dy
        look["mats"].append(Image.fromarray((np.clip(mat * look["light"], 0, 1) * 255).astype(np.uint8)))
    return look


class View:
    """What one camera sees of one moment: world mm -> pixels, and discs and rods drawn there."""

    def __init__(self, camera, tip, look):
        index = list(CAMERAS).index(camera)
        position, at, focal = (np.array(v, float) for v in CAMERAS[camera])
        if camera == "tool_camera":
            position, at = position + tip, at + tip
        self.position = position + look["jitter"][index]
        self.forward = (at - self.position) / np.linalg.norm(at - self.position)
        self.right = np.cross(self.forward, [0, 0, 1.0] if abs(self.forward[2]) < 0.95 else [0, 1.0, 0])
        self.right /= np.linalg.norm(self.right)
        self.up = np.cross(self.right, self.forward)
        self.look, self.tilt, self.picture = look, look["tilt"][index], look["mats"][index].copy()
        self.pixels, self.draw = float(focal) * self.picture.height, ImageDraw.Draw(self.picture)

    def project(self, point):
        """World mm -> ((x, y) in pixels, pixels per mm there)."""
        d = np.asarray(point, float) - self.position
        z = d @ self.forward
        x = self.picture.width / 2 + self.pixels * (d @ self.right / z + self.tilt[0])
        y = self.picture.height / 2 - self.pixels * (d @ self.up / z + self.tilt[1])
        return (x, y), self.pixels / z

    def color(self, base, shift):
        shifted = (np.array(base) + self.look["color"][shift]) * self.look["light"]
        return tuple(int(v) for v in np.clip(shifted * 255, 0, 255))

    def disc(self, point, radius_mm, fill):
        (x, y), k = self.project(point)
        self.draw.ellipse([x - radius_mm * k, y - radius_mm * k, x + radius_mm * k, y + radius_mm * k], fill=fill)

    def rod(self, a, b, thickness_mm, fill):
        (start, k), (end, _) = self.project(a), self.project(b)
        self.draw.line([*start, *end], fill=fill, width=max(2, int(thickness_mm * k)))


def render(pose, entry, camera, look, rng):
    """-> (H, W, 3) uint8 RGB of one camera; sensor noise is drawn from `rng`."""
    view, tip = View(camera, pose[:3], look), pose[:3]
    view.disc(entry - [0, 0, 16.0], 15.0, view.color((0.92, 0.88, 0.85), 0))  # the eye: a ball below the entry
    view.rod(entry, entry - [0, 0, 5.0], 6.0, view.color((0.15, 0.25, 0.85), 1))  # the trocar's tube
    view.disc(entry, 4.0, view.color((0.1, 0.8, 0.9), 2))  # and its mouth
    hub = tip - 28 * needle_axis(pose)
    view.rod(tip, hub, 3.0, view.color((0.95, 0.15, 0.1), 3))
    view.disc(hub, 4.5, view.color((0.2, 0.9, 0.2), 3))
    view.disc(tip, 3.0, view.color((1.0, 0.9, 0.1), 3))
    small = view.picture.width // SUPERSAMPLE, view.picture.height // SUPERSAMPLE
    image = np.asarray(view.picture.resize(small, Image.BOX), np.float32)
    return np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)


# ---- insertion episodes (HDF5) ---------------------------------------------------------------------------------------


def write_insertion(folder, episodes=4, seed=0, layout="jpeg", **form):
    """Episodes in the insertion recorders' file format; `form`: see write_insertion_episode. All variants of one seed
    show the same scene, so that readers can be compared across them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    one = functools.partial(write_insertion_episode, folder, seed=seed, layout=layout, **form)
    bar = functools.partial(tqdm, total=episodes, desc=f"insertion episodes ({layout})", unit="episode", disable=None)
    if episodes < 8:
        return list(bar(map(one, range(episodes))))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return list(bar(pool.imap(one, range(episodes))))


def write_insertion_episode(
    folder,
    i,
    seed=0,
    layout="jpeg",  # variable-length, quality 95; "raw": contiguous; "gzip": chunked, compressed
    size=(96, 128),  # height, width
    position_unit="mm",  # or "m"
    rotation_unit="rad",  # or "deg"
    action="past_delta",  # the motion already made, as the simulator's collectors store it; "joints": absolute targets
    phase=True,
    instruction=True,
    timestamp=True,
    max_frames=None,
):
    rng = np.random.default_rng([seed, i])
    run, look = simulate(rng), randomise(rng, size)
    pose, phases = run["pose"][:max_frames], run["phase"][:max_frames]
    joints, stored = joint_angles(pose), pose.copy()
    stored[:, :3] *= 1e-3 if position_unit == "m" else 1.0
    stored[:, 3:] *= 180 / np.pi if rotation_unit == "deg" else 1.0
    past = np.concatenate([np.zeros((1, 6)), np.diff(stored, axis=0)])
    targets = np.concatenate([joints[1:], joints[-1:]])
    path = folder / f"episode_20260101_{hhmmss(i)}.h5"
    with h5py.File(path, "w") as f:
        store = functools.partial(f.create_dataset, compression="gzip")
        store("action", data=(past if action == "past_delta" else targets).astype(np.float32))
        store("observations/ee_pose", data=stored.astype(np.float32))
        store("observations/qpos", data=(joints + rng.normal(0, 0.001, joints.shape)).astype(np.float32))
        for camera in CAMERAS:
            images = [render(p, run["entry"], camera, look, rng) for p in pose]
            write_images(f, f"observations/images/{camera}", images, layout)
        if phase:
            store("phase", data=phases)
        if timestamp:
            store("timestamp", data=(np.arange(1, len(pose) + 1) / HZ).astype(np.float32))
        if instruction:
            f.create_dataset("language_instruction", data=INSTRUCTION)
    return path


def write_insertion_sim(folder, episodes=4, seed=0, **form):
    """write_insertion as guide 2's simulator records: joint targets, metres, no instruction. The wrist also turns home
    while it aligns, so that all six joints have something to do; yaw cannot be seen, so the images stay true."""
    paths = write_insertion(folder, episodes, seed, position_unit="m", action="joints", instruction=False, **form)
    for path in paths:
        with h5py.File(path, "r+") as f:
            yaw = f["observations/ee_pose"][:, 5]
            home = yaw.copy()
            for t in range(1, len(home)):
                home[t] = home[t - 1] - np.clip(0.3 * home[t - 1], -ALIGN_RAD, ALIGN_RAD)
            turn = home - yaw  # of joint 6, see joint_angles
            f["observations/ee_pose"][:, 5] = home
            f["observations/qpos"][:, 5] += turn
            f["action"][:, 5] += np.append(turn[1:], turn[-1])  # the target is the next frame's joint
    return paths


def joint_angles(pose):
    """A smooth, invertible stand-in for the arm's inverse kinematics: (N, 6) pose in mm/rad -> (N, 6) angles in rad."""
    x, y, z = pose[:, 0] / 100, pose[:, 1] / 100, pose[:, 2] / 100
    arm = [np.arctan2(y, x + 2), 0.8 * z - 0.3 * x, 0.6 * x + 0.4 * z]
    return np.stack([*arm, pose[:, 3], pose[:, 4], pose[:, 5] + 0.2 * y], axis=1)


def write_images(f, key, images, layout):
    if layout == "jpeg":
        dataset = f.create_dataset(key, (len(images),), dtype=h5py.vlen_dtype(np.uint8))
        for i, image in enumerate(images):
            dataset[i] = np.frombuffer(jpeg(image), np.uint8)
    elif layout == "raw":
        f.create_dataset(key, data=np.stack(images))
    elif layout == "gzip":
        f.create_dataset(key, data=np.stack(images), compression="gzip")
    else:
        raise ValueError(f"layout '{layout}': expected jpeg, raw or gzip")


def jpeg(image, quality=95):
    """(H, W, 3) uint8 RGB -> JPEG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def hhmmss(seconds):
    """Seconds -> the time of day as the recorders write it into file names."""
    return time.strftime("%H%M%S", time.gmtime(seconds))


# ---- backbones: Qwen2.5-VL and SmolVLM2 ------------------------------------------------------------------------------

QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
QWEN_SPECIALS += ["<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"]
QWEN_SPECIALS += ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
ACTION_TOKENS = 2048
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLIP_COLOURS = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2))


def tower(size, heads=4):
    """(width, layers) -> the sizes of a transformer by their usual names."""
    sizes = dict(hidden_size=size[0], intermediate_size=2 * size[0])
    return sizes | dict(num_hidden_layers=size[1], num_attention_heads=heads)


def write_random(folder, model_class, config, seed):
    """Save a model with transformers' own random initialisation, and its config."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model_class(config).save_pretrained(folder)


def byte_level_tokenizer(specials, merges_from):
    """A byte-level BPE `tokenizers.Tokenizer`: 256 byte symbols, merges learned from texts, then `specials`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=symbols, show_progress=False)
    tokenizer.train_from_iterator(merges_from, trainer)
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    return tokenizer


def write_qwen2_5_vl(folder, seed=0, text=(128, 2), vision=(96, 2), action_tokens=True, init=0.06):
    """A tiny random Qwen2.5-VL directory that AutoTokenizer, AutoImageProcessor and from_pretrained open like the real
    one. `text`, `vision` = (width, layers). With `action_tokens` the tokenizer has NORA's <robot_action_0> .. 2047."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [INSTRUCTION, "You are a helpful assistant.", "system", "user", "assistant"]
    raw = byte_level_tokenizer(QWEN_SPECIALS, texts * 3)
    if action_tokens:
        raw.add_tokens([AddedToken(f"<robot_action_{i}>", normalized=False) for i in range(ACTION_TOKENS)])
    ends = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=32768)
    PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHAT_TEMPLATE, **ends).save_pretrained(folder)
    pictures = dict(image_processor_type="Qwen2VLImageProcessor", patch_size=14, temporal_patch_size=2, merge_size=2)
    pictures |= dict(min_pixels=3136, max_pixels=1003520, **CLIP_COLOURS)
    write_json(folder / "preprocessor_config.json", pictures)

    half = text[0] // 8 // 2  # 8 heads; the three rope sections add up to half a head
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=sections)
    text_config = tower(text, heads=8) | dict(vocab_size=raw.get_vocab_size(), num_key_value_heads=4)
    text_config |= dict(max_position_embeddings=4096, rope_parameters=rope, tie_word_embeddings=True)
    text_config |= dict(initializer_range=init, bos_token_id=raw.token_to_id("<|endoftext|>"))
    text_config |= dict(eos_token_id=raw.token_to_id("<|im_end|>"))
    vision_config = dict(depth=vision[1], hidden_size=vision[0], intermediate_size=2 * vision[0], num_heads=4)
    vision_config |= dict(fullatt_block_indexes=list(range(1, vision[1])), window_size=112)
    vision_config |= dict(out_hidden_size=text[0], initializer_range=init)
    names = dict(image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end")
    tokens = {f"{key}_token_id": raw.token_to_id(f"<|{name}|>") for key, name in names.items()}
    towers = dict(text_config=text_config, vision_config=vision_config)
    config = Qwen2_5_VLConfig(**towers, **tokens, tie_word_embeddings=True)
    write_random(folder, Qwen2_5_VLForConditionalGeneration, config, seed)
    return folder


SMOLVLM_NAMED = dict(image_token="<image>", fake_image_token="<fake_token_around_image>")
SMOLVLM_NAMED |= dict(global_image_token="<global-img>", end_of_utterance_token="<end_of_utterance>")
SMOLVLM_SPECIALS = ["<pad>", "<unk>", "<bos>", "<eos>", *SMOLVLM_NAMED.values()]


def write_smolvlm2(folder, seed=0, text=(96, 4), vision=(96, 2), image_size=64, patch=16, shuffle=1, init=0.06):
    """A tiny random SmolVLM2 directory that AutoConfig, AutoTokenizer and from_pretrained open like the real one.

    `text`, `vision` = (width, layers); an image of image_size pixels becomes (image_size / patch / shuffle)^2 tokens.
    """
    from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [INSTRUCTION + "\n", "Insert needle into eye trocar in simulation\n"]
    raw = byte_level_tokenizer(SMOLVLM_SPECIALS, texts * 3)
    ends = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>", model_max_length=8192)
    PreTrainedTokenizerFast(tokenizer_object=raw, **ends).save_pretrained(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())  # LeRobot's transformers 4 looks for class and
    about |= dict(tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens=SMOLVLM_NAMED)  # named specials
    write_json(folder / "tokenizer_config.json", about)
    pictures = dict(image_processor_type="SmolVLMImageProcessor", processor_class="SmolVLMProcessor")
    pictures |= dict(do_convert_rgb=True, do_image_splitting=True, do_normalize=True, do_pad=True)
    pictures |= dict(do_rescale=True, do_resize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pictures |= dict(max_image_size=dict(longest_edge=image_size), size=dict(longest_edge=image_size))
    pictures |= dict(resample=1, rescale_factor=1 / 255)
    write_json(folder / "preprocessor_config.json", pictures)
    processor = dict(processor_class="SmolVLMProcessor", image_seq_len=(image_size // patch // shuffle) ** 2)
    write_json(folder / "processor_config.json", processor)

    text_config = tower(text, heads=6) | dict(model_type="llama", num_key_value_heads=2, tie_word_embeddings=False)
    text_config |= dict(head_dim=text[0] // 6 // 2 * 2, vocab_size=raw.get_vocab_size(), rms_norm_eps=1e-5)
    text_config |= {f"{name}_token_id": raw.token_to_id(f"<{name}>") for name in ("pad", "bos", "eos")}
    text_config |= dict(initializer_range=init)
    vision_config = tower(vision) | dict(image_size=image_size, patch_size=patch, initializer_range=init)
    towers = dict(text_config=text_config, vision_config=vision_config, scale_factor=shuffle)
    tokens = {f"{name}_token_id": raw.token_to_id(f"<{name}>") for name in ("image", "pad")}
    config = SmolVLMConfig(**towers, **tokens, tie_word_embeddings=False)
    write_random(folder, SmolVLMForConditionalGeneration, config, seed)
    return folder


def write_fast(folder, seed=0, horizon=10, dim=6, vocab_size=1024, scale=10):
    """A FAST tokenizer directory in the public file layout (processor_config.json + tokenizer.json), fitted on smooth
    random chunks the way the public one is: the alphabet is chr(0) .. chr(max - min), so byte symbols that no
    coefficient used are missing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    knots, at = rng.uniform(-1, 1, (800, 4, dim)), np.linspace(0, 3, horizon)
    low = np.minimum(at.astype(int), 2)
    chunks = knots[:, low] + (at - low)[None, :, None] * (knots[:, low + 1] - knots[:, low])  # (800, H, A)
    k, n = np.mgrid[:horizon, :horizon]
    dct = np.sqrt(np.where(k == 0, 1, 2) / horizon) * np.cos(np.pi * (n + 0.5) * k / horizon)
    q = np.rint(dct @ chunks * scale).astype(int)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = [chr(i) for i in range(q.max() - q.min() + 1)]
    form = dict(initial_alphabet=alphabet, special_tokens=[], max_token_length=10000, show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, **form)
    bpe.train_from_iterator(["".join(map(chr, c.ravel() - q.min())) for c in q], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    remote = {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"}
    about = dict(action_dim=None, auto_map=remote, min_token=int(q.min()), processor_class="UniversalActionProcessor")
    about |= dict(scale=scale, time_horizon=None, vocab_size=bpe.get_vocab_size())
    write_json(folder / "processor_config.json", about)
    about = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    write_json(folder / "tokenizer_config.json", about)
    return folder


# ---- VAMOS (parquet) and OpenVLA -------------------------------------------------------------------------------------

POSTS = {"red": (230, 40, 35), "blue": (40, 60, 235)}
POST_M = (0.7, 1.2)  # width, height of a post
VAMOS_CAMERA = dict(height_m=0.5, focal=0.9)  # focal length in image widths; looks straight ahead, x forward, y left


def post_pixel(x, y, z, size):
    """A place, m forward, to the left and up -> (x, y) in pixels."""
    height, width = size
    focal = VAMOS_CAMERA["focal"] * width
    return width / 2 - focal * y / x, 0.42 * height + focal * (VAMOS_CAMERA["height_m"] - z) / x


def place_posts(rng):
    """-> ({post: (x, y) m}, look of the scene)"""
    places, names = {}, list(rng.permutation(list(POSTS)))
    # one on either side, so that one never hides the other
    for side, name in zip(rng.permutation([-1, 1]), names, strict=True):
        x = rng.uniform(2.5, 6.0)
        places[name] = (x, side * rng.uniform(0.1, 0.42) * x)
    sky, grass = np.array([150, 180, 215]) + rng.uniform(-15, 15, 3), np.array([95, 125, 75]) + rng.uniform(-15, 15, 3)
    return places, dict(sky=sky, grass=grass)


def render_posts(places, look, size, rng):
    """-> (H, W, 3) uint8 RGB. The shade of a post is drawn when it is first seen and kept in `look`."""
    above = (np.arange(size[0]) < 0.42 * size[0])[:, None, None]
    pixels = np.where(above, look["sky"], look["grass"]) + rng.normal(0, 4, (*size, 3))
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for name, (x, y) in sorted(places.items(), key=lambda item: -item[1][0]):  # the far one first
        top, foot = ((x, y + POST_M[0] / 2, POST_M[1]), (x, y - POST_M[0] / 2, 0))
        colour = np.clip(np.array(POSTS[name]) + look.setdefault(name, rng.uniform(-15, 15, 3)), 0, 255)
        draw.rectangle([*post_pixel(*top, size), *post_pixel(*foot, size)], fill=tuple(int(v) for v in colour))
    return np.asarray(picture)


def vamos_row(rng, size, other_instruction=0.7):
    """One outdoor image with two coloured posts -> list of one or two rows (dicts in VAMOS' columns): the same
    image, another post in the instruction, another path. A path is 6 to 24 equal steps, so the velocity of a step is
    the way to the post / 15 and can only be known from image and instruction together."""
    places, look = place_posts(rng)
    told, (x, y) = list(places), places[list(places)[1]]
    if rng.random() > other_instruction:  # nearer to the named post the other one leaves the image
        places[told[1]], told = (x, y * rng.uniform(1, 3)), told[:1]
    encoded, rows = jpeg(render_posts(places, look, size, rng), 90), []
    for name in told:
        (x, y), steps = places[name], int(rng.integers(6, 25))
        drift = np.pad(rng.normal(0, 0.004, (steps, 2)).cumsum(0), ((1, 0), (0, 0)))
        path = np.arange(steps + 1)[:, None] * (np.array([[x, y]]) / 15) + drift
        path = np.concatenate([path, np.full((steps + 1, 1), 0.01)], axis=1)
        u, v = post_pixel(x, y, 0, size)
        row = dict(
            image=dict(bytes=encoded, path=None),
            trajectory_3d=path.tolist(),
            trajectory_2d=[[int(c) for c in post_pixel(max(p[0], 0.3), p[1], 0, size)] for p in path],
            horizon=len(path),
            text=f"Navigate to x=<loc{int(u / size[1] * 1023):04d}>, y=<loc{int(min(v / size[0], 1) * 1023):04d}>",
            lang_goal=f"Go to the {name} post",
        )
        rows.append(row)
    return rows


def write_vamos(folder, images=1500, validation_images=60, seed=0, size=(112, 160), files=4, rows_per_group=100):
    """A VAMOS-format data set: `images` images in `files` train-*.parquet, `validation_images` in one
    validation-*.parquet. A few rows are as broken as in real recordings: a path of one point, a missing instruction."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = dict(
        image=pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        trajectory_2d=pa.list_(pa.list_(pa.int64())),
        trajectory_3d=pa.list_(pa.list_(pa.float64())),
        horizon=pa.int64(),
        text=pa.string(),
        lang_goal=pa.string(),
    )
    (Path(folder) / "data").mkdir(parents=True, exist_ok=True)
    paths = []
    plans = [("train", f, files, images) for f in range(files)]
    for part, f, number, count in [*plans, ("validation", 0, 1, validation_images)]:
        rng, rows = np.random.default_rng([seed, part == "train", f]), []
        for _ in range(count * (f + 1) // number - count * f // number):
            rows += vamos_row(rng, size)
        rows = [rows[i] for i in rng.permutation(len(rows))]
        if part == "train" and f == 0:
            rows[1]["trajectory_3d"], rows[2]["lang_goal"] = rows[1]["trajectory_3d"][:1], None
        paths.append(Path(folder) / "data" / f"{part}-{f:05d}-of-{number:05d}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), paths[-1], row_group_size=rows_per_group)
    return paths


def llama_tokenizer(words):
    """A `tokenizers.Tokenizer` in the form of Llama 2's: 32,000 pieces, bytes as <0x..>, 29871 = "▁", 31744 .. 31999
    single characters. Every word of `words` is one piece, all else falls apart into characters or bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    merges = {}  # in order
    for word in words:
        for n in range(1, len(word) + 1):
            merges[("▁" + word)[:n], word[n - 1]] = True
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *("".join(m) for m in merges)]
    pieces += [f"<filler_{i}>" for i in range(29871 - len(pieces))] + ["▁", *(chr(c) for c in range(33, 127))]
    pieces += [chr(0x4E00 + i) for i in range(32000 - len(pieces))]
    vocab, unknown = {p: i for i, p in enumerate(pieces)}, dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    raw = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), **unknown))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    raw.decoder = decoders.Sequence(list(spaces))
    begin = dict(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    raw.post_processor = processors.TemplateProcessing(**begin)
    raw.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in ("<unk>", "<s>", "</s>", "<PAD>")])
    return raw


def write_llama_tokenizer(folder, words):
    """The tokenizer's files as openvla-7b has them."""
    tokenizer = json.loads(llama_tokenizer(words).to_str())
    merges = tokenizer["model"]["merges"]  # the older of two spellings: transformers 4.40 reads no other
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in merges]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<PAD>")
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
    special = {k: dict(content=v) | flags for k, v in names.items()}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "added_tokens.json", {"<PAD>": 32000})
    about = dict(add_bos_token=True, add_eos_token=False) | names
    about |= dict(clean_up_tokenization_spaces=False, legacy=False, model_max_length=2048, padding_side="right")
    about |= dict(processor_class="PrismaticProcessor", sp_model_kwargs={}, tokenizer_class="LlamaTokenizer")
    places = dict(unk_token=0, bos_token=1, eos_token=2, pad_token=32000)
    decoder = {str(i): special[k] | dict(special=True) for k, i in places.items()}
    about |= dict(use_default_system_prompt=False, added_tokens_decoder=decoder)
    write_json(folder / "tokenizer_config.json", about)


def prismatic_settings(image_size):
    """preprocessor_config.json of openvla-7b: DINOv2's and SigLIP's view of one image."""
    settings = dict(image_processor_type="PrismaticImageProcessor", processor_class="PrismaticProcessor")
    settings |= dict(image_resize_strategy="resize-naive", input_sizes=[[3, image_size, image_size]] * 2)
    settings |= dict(interpolations=["bicubic"] * 2, means=[[0.485, 0.456, 0.406], [0.5] * 3])
    settings |= dict(stds=[[0.229, 0.224, 0.225], [0.5] * 3])
    square = [image_size, image_size]
    dino = dict(mean=[0.484375, 0.455078125, 0.40625], std=[0.228515625, 0.2236328125, 0.224609375], inplace=False)
    siglip = dict(mean=[0.5] * 3, std=[0.5] * 3, inplace=False)
    settings |= dict(tvf_crop_params=[dict(output_size=square)] * 2, tvf_do_letterbox=False, tvf_letterbox_fill=None)
    resize = dict(size=square, interpolation=3, max_size=None, antialias=True)
    settings |= dict(tvf_normalize_params=[dino, siglip], tvf_resize_params=[resize] * 2)
    return settings | dict(use_fused_vision_backbone=True)


def openvla_config(text, dino, siglip, image_size):
    """config.json of openvla-7b, with towers of other sizes."""
    config = dict(architectures=["OpenVLAForActionPrediction"], model_type="openvla")
    config |= dict(arch_specifier="no-align+fused-gelu-mlp", vision_backbone_id="dinosiglip-vit-so-224px")
    config |= dict(llm_backbone_id="llama2-7b-pure", hf_llm_id="meta-llama/Llama-2-7b-hf")
    config |= dict(image_resize_strategy="resize-naive", image_sizes=[image_size] * 2)
    timm = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
    config |= dict(timm_override_act_layers=[None, None], timm_model_ids=timm, use_fused_vision_backbone=True)
    config |= dict(n_action_bins=256, llm_max_length=2048, pad_token_id=32000, pad_to_multiple_of=64)
    arm = dict(q01=[-1.0] * 7, q99=[1.0] * 7, mask=[True] * 6 + [False])
    config |= dict(output_projector_states=False, norm_stats={"demo_arm": {"action": arm}}, torch_dtype="float32")
    llama = dict(model_type="llama", vocab_size=32064, pad_token_id=32000, torch_dtype="float32")
    config |= dict(text_config=llama | tower(text) | dict(num_key_value_heads=4))
    sizes = {}
    for name, (width, layers) in dict(featurizer=dino, fused_featurizer=siglip).items():
        sizes[name] = dict(embed_dim=width, depth=layers, num_heads=4, mlp_ratio=2.0)
    return config | dict(vision_sizes=sizes)


def random_openvla(config, seed):
    """A random OpenVLA, but for what 2,000 images cannot teach: neighbouring action tokens mean similar actions."""
    import torch

    from modeling_openvla import OpenVLAConfig, OpenVLAForActionPrediction

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = OpenVLAForActionPrediction(OpenVLAConfig(**config))
        for name, p in model.named_parameters():
            # a random tower that tells places and colours apart; 0.02 would be nearly blind at this width
            if p.ndim > 1 and "norm" not in name:
                p.normal_(0, 0.3 if p.ndim == 3 or "embed_tokens" in name else p[0].numel() ** -0.5)
        tokens, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        width = tokens.shape[1]
        u, wave = torch.linspace(-1, 1, 256)[:, None], torch.rand(2, width) * torch.tensor([[4.0], [2.0]])
        curve = torch.cos(torch.pi * (u * wave[0] + wave[1]))
        tokens[model.action_begin : model.action_end] = 0.4 * curve
        head[model.action_begin : model.action_end] = 2 * width**-0.5 * curve
    return model


def write_openvla(folder, seed=0, text=(64, 3), dino=(48, 2), siglip=(48, 2), image_size=84, shards=2):
    """A tiny random OpenVLA directory in the file layout of openvla/openvla-7b: config, image processor, Llama
    tokenizer, `shards` safetensors with their index. No Python files: ours belong to modeling_openvla.py.

    `text`, `dino`, `siglip` = (width, layers); of a tower's layers the last one is never run.
    """
    from safetensors.torch import save_file

    from modeling_openvla import prompt_of

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = (prompt_of("") + " go to the red blue post").replace("?\nOut:", "").split()
    write_llama_tokenizer(folder, words)
    write_json(folder / "preprocessor_config.json", prismatic_settings(image_size))
    config = openvla_config(text, dino, siglip, image_size)
    write_json(folder / "config.json", config)
    generation = dict(_from_model_config=True, bos_token_id=1, eos_token_id=2, pad_token_id=32000)
    write_json(folder / "generation_config.json", generation)
    tensors, split, index = random_openvla(config, seed).state_dict(), {}, {}
    for i, name in enumerate(tensors):
        index[name] = f"model-{i * shards // len(tensors) + 1:05d}-of-{shards:05d}.safetensors"
        split.setdefault(index[name], {})[name] = tensors[name].contiguous()
    for name, shard in split.items():
        save_file(shard, folder / name, metadata={"format": "pt"})
    total = dict(total_size=sum(t.numel() * 4 for t in tensors.values()))
    write_json(folder / "model.safetensors.index.json", dict(metadata=total, weight_map=index))
    return folder


# ---- mobile base (HDF5) and Kosmos-2 ---------------------------------------------------------------------------------
# A base that drives without turning sees two bottles, one on its left and one on its right, and a box between them. The
# instruction says which one to drive to, and nothing else does: every scene is recorded twice, with opposite motion.
# How far, and when to stop, is in the images.

MOBILE_SPEED = 1.15  # what a key sends per axis; one key is one frame and moves the base by MOBILE_STEP
MOBILE_STEP = 0.13  # m
MOBILE_FRAMES = 18  # the recorder's length
MOBILE_GOAL = "Navigate around obstacles and reach the front of the beverage bottle on the"


def write_mobile(folder, episodes=200, seed=0, size=(72, 128), colour_order="bgr", frames=MOBILE_FRAMES):
    """`episodes` recordings (even ones left, odd ones right, two of a scene in a row) in the file form of the mobile
    recorder: images gzip in OpenCV's order, the action of a key beside the image taken after it was sent, a
    motionless frame 0. Every fifth file lacks its language_instruction: its name tells the side."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in tqdm(range(episodes), desc="mobile episodes", unit="episode", disable=None):
        side = ("left", "right")[i % 2]
        images, actions = drive(np.random.default_rng([seed, 7, i // 2]), i % 2, size, frames)
        if colour_order == "bgr":
            images = [image[..., ::-1] for image in images]
        paths.append(folder / f"episode_20251115_{hhmmss(i)}_1box_hori_{side}_core_medium.h5")
        with h5py.File(paths[-1], "w") as f:
            f.create_dataset("images", data=np.stack(images), compression="gzip", chunks=(1, *size, 3))
            f.create_dataset("actions", data=np.array(actions, np.float32), compression="gzip")
            events = ["episode_start"] + ["start_action"] * (frames - 1)
            f.create_dataset("action_event_types", data=events, dtype=h5py.string_dtype())
            if i % 5:
                f.create_dataset("language_instruction", data=np.array([f"{MOBILE_GOAL} {side}".encode()], "S256"))
            about = dict(episode_name=paths[-1].stem, num_frames=frames, total_duration=float(frames))
            f.attrs.update(about, action_chunk_size=8)
    return paths


def mobile_scene(rng):
    """-> (bottles (2, 2) m forward and to the left, look of the scene)"""
    left_one = [rng.uniform(1.6, 2.4), rng.uniform(0.4, 0.95)]  # m forward, m to the left
    bottles = np.array([left_one, [rng.uniform(1.6, 2.4), -rng.uniform(0.4, 0.95)]])
    look = dict(box=np.array([rng.uniform(1.1, 1.5), rng.uniform(-0.12, 0.12)]), floor=rng.uniform(0.25, 0.6, 3))
    return bottles, look | dict(wall=rng.uniform(0.5, 0.8, 3), bottle=rng.uniform(-0.1, 0.1, 3))


def mobile_key(gap):
    """(2,) m to go -> -1, 0 or 1 per axis, what a person presses"""
    return np.where(np.abs(gap) > MOBILE_STEP / 2, np.sign(gap), 0.0)


def drive(rng, right, size, frames):
    """One recording towards the left or the right bottle -> images, actions [x, y, 0]."""
    bottles, look = mobile_scene(rng)
    at = rng.choice(2) * rng.uniform((-0.1, -0.3), (0.5, 0.3))  # half of the scenes start off the path
    goal, actions, images = bottles[right] - [0.45, 0.0], [], []
    for t in range(frames):
        key = mobile_key(goal - at) if t else np.zeros(2)
        at = at + MOBILE_STEP / 2 * key  # the image is taken while the base moves: after the command
        images.append(render_mobile(at, bottles, look, size, rng))
        at = at + MOBILE_STEP / 2 * key
        actions.append([*(MOBILE_SPEED * key), 0.0])
    return images, actions


def render_mobile(at, bottles, look, size, rng):
    """-> (H, W, 3) uint8 RGB: what the camera of a base at `at` (m forward, m to the left) sees, looking forward."""
    height, width = size
    picture = Image.new("RGB", (width, height), tuple((look["wall"] * 255).astype(int)))
    draw, horizon = ImageDraw.Draw(picture), 0.35 * height
    draw.rectangle([0, horizon, width, height], fill=tuple((look["floor"] * 255).astype(int)))
    green, red = np.array([0.1, 0.65, 0.2]) + look["bottle"], np.array([0.85, 0.1, 0.1]) + look["bottle"]
    bottle = [(0.3, 0.12, green), (0.12, 0.12, red)]  # height m, width m, colour
    box = [(0.18, 0.3, np.array([0.55, 0.35, 0.15]))]
    things = [(*b, bottle) for b in bottles] + [(*look["box"], box)]
    for forward, left, parts in sorted(things, key=lambda thing: thing[:2], reverse=True):  # far ones first
        away = np.maximum(forward - at[0], 0.15)
        k, x = 0.55 * width / away, width / 2 - 0.55 * width * (left - at[1]) / away  # k: pixels per m
        foot = horizon + 0.22 * width / away
        for tall, wide, colour in parts:
            corners = [x - wide / 2 * k, foot - tall * k, x + wide / 2 * k, foot]
            draw.rectangle(corners, fill=tuple((np.clip(colour, 0, 1) * 255).astype(int)))
    return np.clip(np.asarray(picture, np.float32) + rng.normal(0, 2, (height, width, 3)), 0, 255).astype(np.uint8)


KOSMOS_TAGS = ["</doc>", "<image>", "</image>", "</chunk>", "</line>", "<phrase>", "</phrase>"]
KOSMOS_TAGS += ["<object>", "</object>", "</delimiter_of_multi_objects/>", "<grounding>"]


def write_kosmos2(folder, seed=0, text=(96, 2), vision=(96, 2), image_size=56, patch=14, queries=24):
    """A tiny random Kosmos-2 directory that AutoTokenizer and Kosmos2Model.from_pretrained open like the real one.
    `text`, `vision` = (width, layers). The tokenizer has the real one's form (unigram pieces, <s> 0, <pad> 1, </s> 2,
    <unk> 3, the tags behind all pieces) without the 1024 patch tokens."""
    import torch
    from tokenizers import AddedToken
    from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration, XLMRobertaTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted(set(f"{MOBILE_GOAL} left right Navigate to the target location".split()))
    pieces = [f"▁{w}" for w in words] + ["▁"] + [chr(c) for c in range(33, 127) if chr(c) not in "<>"]
    vocab = [(s, 0.0) for s in ("<s>", "<pad>", "</s>", "<unk>")]
    tokenizer = XLMRobertaTokenizer(vocab=vocab + [(p, -1.0 if len(p) > 1 else -9.0) for p in pieces])
    tokenizer.add_tokens([AddedToken(t, lstrip=True, rstrip=False, normalized=False) for t in KOSMOS_TAGS])
    tokenizer.save_pretrained(folder)
    pictures = dict(image_processor_type="CLIPImageProcessor", processor_class="Kosmos2Processor", do_center_crop=True)
    pictures |= dict(do_convert_rgb=True, do_normalize=True, do_rescale=True, do_resize=True, rescale_factor=1 / 255)
    square = dict(height=image_size, width=image_size)
    pictures |= dict(resample=3, crop_size=square, size=square, **CLIP_COLOURS)
    write_json(folder / "preprocessor_config.json", pictures)
    text_config = dict(vocab_size=len(tokenizer), max_position_embeddings=512, init_std=0.1, attention_heads=4)
    text_config |= dict(embed_dim=text[0], layers=text[1], ffn_dim=2 * text[0])
    vision_config = tower(vision) | dict(image_size=image_size, patch_size=patch)
    config = Kosmos2Config(text_config=text_config, vision_config=vision_config, latent_query_num=queries)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Kosmos2ForConditionalGeneration(config)
        sharpen_kosmos2(model, text[0], vision[0], patch)
        model.save_pretrained(folder)
    return folder


def sharpen_kosmos2(model, text_width, vision_width, patch):
    """A random tower has learned nothing, so draw its weights such that the image tokens keep what the images show:
    with the usual initialisation they are all alike."""
    from torch.nn.init import normal_

    tower, projection = model.vision_model.model, model.image_to_text_projection
    normal_(model.text_model.model.embed_tokens.weight, std=1.0)  # as loud as the image tokens
    normal_(tower.embeddings.position_embedding.weight, std=1.0)
    normal_(tower.embeddings.patch_embedding.weight, std=1 / patch / 3**0.5)
    for layer in tower.encoder.layers:  # the patches stay what they are, with a little of the others
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.fc1, mlp.fc2):
            normal_(linear.weight, std=0.5 / vision_width**0.5)
    normal_(projection.dense.weight, std=3.0)  # what comes in is L2-normalised
    sharp = projection.x_attn  # every query looks at a few patches
    normal_(sharp.q_proj.weight, std=0.3)
    normal_(sharp.k_proj.weight, std=0.3)
    normal_(sharp.v_proj.weight, std=text_width**-0.5)
    normal_(sharp.out_proj.weight, std=text_width**-0.5)


# ---- robot sessions: CSV, npz and images, as guide 5's recorders write them ------------------------------------------
# The phantom stands on a turntable: the tip chases a trocar that goes round, and follows tissue that breathes. Where
# the trocar is can be seen: the tool camera looks at a mat, fixed to the trocar, whose red rises to the right and blue
# to the bottom. What can only be felt: the A-scan's peak follows the tissue's height, the force a torsion of its own
# pace, to which the last axis gives way. Recordings without a sensor are of a stiff phantom: nothing to feel.

TISSUE_MM, TISSUE_HZ, TABLE_HZ = 4.0, 0.9, 0.35
TWIST_DEG, TWIST_HZ = 1.5, 0.65
JOINTS = "{0}_1,{0}_2,{0}_3,{0}_4,{0}_5,{0}_6"
POSE = "{0}_x,{0}_y,{0}_z,{0}_a,{0}_b,{0}_r"
CSV_COLUMNS = f"recv_timestamp,origin_timestamp,send_timestamp,{{force}},{JOINTS.format('joint')},{POSE.format('pose')}"
LEGACY_COLUMNS = f"timestamp,{JOINTS.format('joint_angle')},{POSE.format('EE')}"
ZED, OAK = "zed_41182735_left_{:.3f}.jpg", "oak_1844301_{:.3f}.jpg"
SESSION_FILES = {  # layout: the robot's log, the sensor's file, images of View1 and of View5
    "old": ("robot_state_{}.csv", "sensor_data_{}.npz", f"View1/left/{ZED}", f"View5/{OAK}"),
    "new": ("robot_states.csv", "sensor_data.npz", "images/View1/{:.6f}.jpg", "images/View5/{:.6f}.jpg"),
    "legacy": ("robot_rt_{}.csv", "sensor_data_{}.npz", f"view1/left/{ZED}", f"view5_oak/{OAK}"),
}


def make_wave(rng, hz):
    hz, start = hz + rng.uniform(-0.04, 0.04), rng.uniform(0, 2 * np.pi)
    return lambda seconds: np.sin(2 * np.pi * hz * seconds + start)


def simulate_session(rng, seconds, breathes=True):
    """-> dict(t (n,) s at 100 Hz, pose (n, 6) mm and degrees, offset (n, 2) mm from the trocar to the tip, height and
    twist: functions of seconds -> -1..1)."""
    t = np.arange(int(seconds * 100)) / 100
    height, twist = make_wave(rng, TISSUE_HZ), make_wave(rng, TWIST_HZ)
    angle = 2 * np.pi * TABLE_HZ * t + rng.uniform(0, 2 * np.pi)
    trocar = rng.uniform(10, 15) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    xy, here = np.zeros((len(t), 2)), trocar[0] + rng.uniform(-10, 10, 2)
    for i in range(len(t)):
        xy[i] = here
        here = here + 2.5 * (trocar[i] - here) / 100  # per second 2.5 times the way that is left
    offset, xy = xy - trocar, xy + [80.0, 118.0]
    z, x, y = 245 + breathes * TISSUE_MM * height(t), *xy.T
    last = 179 + 0.1 * (x - 80) + breathes * TWIST_DEG * twist(t)  # crosses 180
    tilt = np.stack([-150 + 0.3 * (y - 118), 43 - 0.3 * (x - 80), last], axis=1)
    pose = np.concatenate([xy, z[:, None], (tilt + 180) % 360 - 180], axis=1)
    return dict(t=t, pose=pose, offset=offset, height=height, twist=twist)


def session_sensor(run, stamps, rng):
    """Seconds (n,) -> force (n,) float32 and A-scan (n, 1025) float32 with a peak at the tissue."""
    peak = 60 * np.exp(-(((np.arange(1025) - 500 - 120 * run["height"](stamps)[:, None]) / 25) ** 2))
    ascan = 45 + peak + rng.integers(0, 4, (len(stamps), 1025))
    force = 1 + 0.8 * run["twist"](stamps) + rng.normal(0, 0.03, len(stamps))
    return force.astype(np.float32), np.rint(ascan).astype(np.float32)


def render_session(offset, view, size, rng):
    """-> (H, W, 3) uint8. View1: tool camera, 12 mm wide, over the tip. View5: the whole grey table, trocar and tip."""
    height, width = size
    scale = width / (12 if view == "View1" else 80)  # pixels per mm
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    x, y = (xs - width / 2) / scale, (ys - height / 2) / scale  # mm from the middle
    if view == "View1":
        x, y = x + offset[0], y + offset[1]  # mm from the trocar
        mat = np.stack([0.5 + 0.025 * x, np.full_like(x, 0.4), 0.5 + 0.025 * y], axis=-1)
    else:
        mat = np.full((height, width, 3), 0.5, np.float32)
        mat[(x - offset[0]) ** 2 + (y - offset[1]) ** 2 < 9] = (1.0, 0.9, 0.1)  # the tip
    mat[x**2 + y**2 < 4] = (0.1, 0.8, 0.9)  # the trocar
    return np.clip(mat * 255 + rng.normal(0, 4, mat.shape), 0, 255).astype(np.uint8)


def write_robot_log(path, layout, run, start, rng):
    t, pose = run["t"], run["pose"]
    origin = start + np.rint(np.floor(t / 0.005) * 0.005 * 1000) / 1000
    received = origin + 0.0004 + 0.002 * rng.random(len(t))
    joints = np.degrees(joint_angles(np.concatenate([pose[:, :3], np.radians(pose[:, 3:])], axis=1)))
    if layout == "legacy":
        header, times = LEGACY_COLUMNS, [origin]
    else:
        header = CSV_COLUMNS.format(force="force" if layout == "new" else "force_placeholder")
        times = [received, origin, origin + 0.0003, 0 * t]
    np.savetxt(path, np.column_stack([*times, joints, pose]), "%.17g", ",", header=header, comments="")


def write_sensor(path, layout, run, seconds, start, rng):
    first = 0.02
    rows = first + np.arange(int((seconds - first) * 650)) / 650
    force, ascan = session_sensor(run, rows, rng)
    if layout != "new":
        times = dict(timestamps=start + rows, send_timestamps=start + rows + 0.001)
        np.savez(path, **times, forces=force, alines=ascan)
        return
    ends, end = [], 649
    while end < len(rows):  # a window of the newest 650 rows every 200 ms of the saver's clock
        ends.append(end)
        end += int(rng.integers(126, 135))
    data = np.stack([np.column_stack([force[e - 649 : e + 1], ascan[e - 649 : e + 1]]) for e in ends])
    np.savez_compressed(path, timestamps=start + rows[ends], data=data)


def write_session(folder, layout, seed=0, seconds=6.0, sensor=True, size=(72, 128), image_hz=5.0, start=1761551500.0):
    """One recording in `folder` (its name is the recording's) in layout "old", "new" or "legacy". Clock: `start`, epoch
    seconds."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    run = simulate_session(rng, seconds, breathes=sensor)
    robot, felt, *views = SESSION_FILES[layout]
    stamp = f"20251027_{hhmmss(start)}"
    write_robot_log(folder / robot.format(stamp), layout, run, start, rng)
    if sensor:
        write_sensor(folder / felt.format(f"{stamp}_{int(start)}"), layout, run, seconds, start, rng)
    for view, name in zip(("View1", "View5"), views, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for n in range(int(seconds * image_hz)):
            taken = n / image_hz + 0.01 * rng.random()
            picture = render_session(run["offset"][min(int(taken * 100), len(run["t"]) - 1)], view, size, rng)
            (folder / name.format(start + taken)).write_bytes(jpeg(picture, 90))
    if layout == "new":
        about = dict(episode_name=folder.name, start_time=start, end_time=start + seconds)
        about |= dict(camera_views=["View5", "View1"], sensor_hz=650, robot_hz=100, sensor_window_size=650)
        write_json(folder / "metadata.json", about | dict(action_horizon=8, action_dim=7))
    return folder


def write_sessions(folder, seed=0, white=16, needle=5, new=10, oct=4, seconds=6.0, size=(72, 128)):
    """Data sets of all layouts below `folder`: `white` and `new` recordings with sensor, `needle` and `oct` without.
    2.7 MB per second and sensor."""
    plans = [("White_silicone_white_circle/recv_all_{}", "old", True, 4.0)] * white
    plans += [("Needle_insertion_eye_trocar/recv_all_{}", "old", False, 4.0)] * needle
    for n in range(new):
        place = ("Blue_point", "Eye_trocar")[n % 2]
        plans.append((f"Make_dataset/New_dataset/{place}/episode_{{}}", "new", True, 5.0))
    plans += [("OCT_insertion/Captures{}", "legacy", False, 4.0)] * oct
    for i, (name, layout, sensor, hz) in enumerate(tqdm(plans, desc="sessions", unit="recording", disable=None)):
        clock = 1761551500.0 + 60 * i
        path = Path(folder) / name.format(i + 1 if layout == "legacy" else f"20251027_{hhmmss(clock)}")
        write_session(path, layout, seed * 10007 + i, seconds, sensor, size, hz, clock)
    return Path(folder)


# ---- what can be made: name -> function(folder, args). A new format is one function and one line here ----------------

PARTS = {
    "insertion": lambda folder, args: write_insertion(folder, args.episodes, args.seed),
    "qwen2_5_vl": lambda folder, args: write_qwen2_5_vl(folder, args.seed),
    "insertion_sim": lambda folder, args: write_insertion_sim(folder, args.episodes, args.seed),
    "smolvlm2": lambda folder, args: write_smolvlm2(folder, args.seed),
    "fast": lambda folder, args: write_fast(folder, args.seed),
    "vamos": lambda folder, args: write_vamos(folder, seed=args.seed),
    "openvla": lambda folder, args: write_openvla(folder, args.seed),
    "mobile": lambda folder, args: write_mobile(folder, args.episodes, args.seed),
    "kosmos2": lambda folder, args: write_kosmos2(folder, args.seed),
    "sessions": lambda folder, args: write_sessions(folder, args.seed),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to write: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", default="demo", help="folder to write into (default: demo)")
    parser.add_argument("--episodes", type=int, default=200, help="insertion and mobile episodes (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    args = parser.parse_args()
    if args.list:
        print("\n".join(PARTS))
        return
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part '{unknown[0]}': choose from {', '.join(PARTS)}")
    for part in args.parts or PARTS:
        PARTS[part](Path(args.out) / part, args)
        print(f"{part}: {Path(args.out) / part}")


if __name__ == "__main__":
    main()
