"""Write small data sets in every recording format, and tiny random backbones in their real file formats.

The insertion episodes show one seeded scene: a needle tip approaches a trocar on an eye phantom, lines up with it and enters. It is rendered by
pinhole projection into side, tool and top cameras under domain randomisation (light, camera, colours, background, noise: guide 2). Where
the trocar is, and therefore what to do next, can be seen in the images and in nothing else; the frame number tells nothing. The other formats
have small scenes of their own, each made so that what its policy must use (picture, instruction, force) is all that tells the action.

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
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import h5py
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

# ---- scene -----------------------------------------------------------------------------------------------------------
# World frame: mm, z up, the phantom's centre near the origin. ee_pose = needle tip x y z (mm) and roll pitch yaw (rad); the needle points along
# R(roll, pitch) @ (0, 0, -1), yaw turns it about its own axis and changes nothing that can be seen.

HZ = 14.9  # the simulator's frame rate: a frame every 67 physics steps of 1 ms
ALIGN_MM, ALIGN_RAD = 3.0, 0.06  # largest motion of one frame while aligning
INSERT_MM = 1.6  # advance of one frame while inserting
STANDOFF_MM, DEPTH_MM = 8.0, 9.0  # where inserting starts above the entry, and where it ends below it
INSTRUCTION = "Insert the needle into the target point"
SUPERSAMPLE = 2  # drawn at twice the size, then reduced: cheap antialiasing
CAMERAS = {  # name: (position mm, looks at mm, focal length in image heights)
    "side_camera": ((0.0, -150.0, 28.0), (0.0, 0.0, 14.0), 1.7),
    "tool_camera": (
        (0.0, -62.0, 70.0),
        (0.0, 4.0, 0.0),
        0.85,
    ),  # rides on the stage: relative to the tip, does not tilt with it
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
    pose = np.array(
        [
            *(target[:2] + rng.uniform(-24, 24, 2)),
            target[2] + rng.uniform(2, 22),
            *rng.uniform(-0.45, 0.45, 2),
            rng.uniform(-1, 1),
        ]
    )
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
    """Domain randomisation of one episode: light, camera jitter, colours, background; with the backgrounds of the three views already painted."""
    height, width = size
    ys, xs = np.mgrid[-1 : 1 : height * SUPERSAMPLE * 1j, -1 : 1 : width * SUPERSAMPLE * 1j].astype(np.float32)
    look = dict(
        light=rng.uniform(0.85, 1.15),
        jitter=rng.uniform(-2, 2, (3, 3)),
        tilt=rng.uniform(-0.02, 0.02, (3, 2)),
        color=rng.uniform(-0.1, 0.1, (4, 3)),
        mats=[],
    )
    for _ in CAMERAS:  # a colour-graded table mat: red rises to the right, blue to the bottom
        base, dx, dy = (
            np.array([0.45, 0.4, 0.45]) + rng.uniform(-0.05, 0.05, 3),
            [0.3, 0.0, 0.0] + rng.uniform(-0.04, 0.04, 3),
            [0.0, 0.0, 0.3] + rng.uniform(-0.04, 0.04, 3),
        )
        mat = base + xs[..., None] * dx + ys[..., None] * dy
        look["mats"].append(Image.fromarray((np.clip(mat * look["light"], 0, 1) * 255).astype(np.uint8)))
    return look


def render(pose, entry, camera, look, rng):
    """-> (H, W, 3) uint8 RGB of one camera; sensor noise is drawn from `rng`."""
    index = list(CAMERAS).index(camera)
    position, at, focal = (np.array(v, float) for v in CAMERAS[camera])
    if camera == "tool_camera":
        position, at = position + pose[:3], at + pose[:3]
    position = position + look["jitter"][index]
    forward = (at - position) / np.linalg.norm(at - position)
    right = np.cross(forward, [0, 0, 1.0] if abs(forward[2]) < 0.95 else [0, 1.0, 0])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    picture = look["mats"][index].copy()
    width, height = picture.size
    pixels, draw = float(focal) * height, ImageDraw.Draw(picture)

    def project(point):
        """World mm -> ((x, y) in pixels, pixels per mm there)."""
        d = np.asarray(point, float) - position
        z = d @ forward
        return (
            width / 2 + pixels * (d @ right / z + look["tilt"][index, 0]),
            height / 2 - pixels * (d @ up / z + look["tilt"][index, 1]),
        ), pixels / z

    def color(base, shift):
        return tuple(int(v) for v in np.clip((np.array(base) + look["color"][shift]) * look["light"] * 255, 0, 255))

    def disc(point, radius_mm, fill):
        (x, y), k = project(point)
        draw.ellipse([x - radius_mm * k, y - radius_mm * k, x + radius_mm * k, y + radius_mm * k], fill=fill)

    def rod(a, b, thickness_mm, fill):
        (start, k), (end, _) = project(a), project(b)
        draw.line([*start, *end], fill=fill, width=max(2, int(thickness_mm * k)))

    disc(entry - [0, 0, 16.0], 15.0, color((0.92, 0.88, 0.85), 0))  # the eye: a ball below the entry
    rod(entry, entry - [0, 0, 5.0], 6.0, color((0.15, 0.25, 0.85), 1))  # the trocar's tube
    disc(entry, 4.0, color((0.1, 0.8, 0.9), 2))  # and its mouth
    hub = pose[:3] - 28 * needle_axis(pose)
    rod(pose[:3], hub, 3.0, color((0.95, 0.15, 0.1), 3))
    disc(hub, 4.5, color((0.2, 0.9, 0.2), 3))
    disc(pose[:3], 3.0, color((1.0, 0.9, 0.1), 3))
    image = np.asarray(picture.resize((width // SUPERSAMPLE, height // SUPERSAMPLE), Image.BOX), np.float32)
    return np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)


# ---- insertion episodes (HDF5) ---------------------------------------------------------------------------------------


def write_insertion(
    folder,
    episodes=4,
    seed=0,
    layout="jpeg",
    size=(96, 128),
    position_unit="mm",
    rotation_unit="rad",
    action="past_delta",
    phase=True,
    instruction=True,
    timestamp=True,
    max_frames=None,
):
    """Episodes in the file form of the insertion recorders.

    layout "jpeg" (variable-length, quality 95), "raw" (contiguous) or "gzip" (chunked, compressed); `action` "past_delta" stores the motion
    already made, as the simulator's collectors do, "joints" the absolute joint targets of the randomised collector. All variants of one seed
    show the same scene, so that readers can be compared across them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    one = functools.partial(
        _write_insertion_episode,
        folder,
        seed=seed,
        layout=layout,
        size=size,
        position_unit=position_unit,
        rotation_unit=rotation_unit,
        action=action,
        phase=phase,
        instruction=instruction,
        timestamp=timestamp,
        max_frames=max_frames,
    )
    bar = functools.partial(tqdm, total=episodes, desc=f"insertion episodes ({layout})", unit="episode", disable=None)
    if episodes < 8:
        return list(bar(map(one, range(episodes))))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return list(bar(pool.imap(one, range(episodes))))


def _write_insertion_episode(
    folder, i, seed, layout, size, position_unit, rotation_unit, action, phase, instruction, timestamp, max_frames
):
    rng = np.random.default_rng([seed, i])
    run, look = simulate(rng), randomise(rng, size)
    pose, phases = run["pose"][:max_frames], run["phase"][:max_frames]
    n, joints, stored = len(pose), joint_angles(pose), pose.copy()
    stored[:, :3] *= 1e-3 if position_unit == "m" else 1.0
    stored[:, 3:] *= 180 / np.pi if rotation_unit == "deg" else 1.0
    past = np.concatenate([np.zeros((1, 6)), np.diff(stored, axis=0)])
    path = folder / f"episode_20260101_{i // 3600:02d}{i // 60 % 60:02d}{i % 60:02d}.h5"
    with h5py.File(path, "w") as f:
        f.create_dataset(
            "action",
            data=(past if action == "past_delta" else np.concatenate([joints[1:], joints[-1:]])).astype(np.float32),
            compression="gzip",
        )
        f.create_dataset("observations/ee_pose", data=stored.astype(np.float32), compression="gzip")
        f.create_dataset(
            "observations/qpos",
            data=(joints + rng.normal(0, 0.001, joints.shape)).astype(np.float32),
            compression="gzip",
        )
        for camera in CAMERAS:
            _write_images(
                f, f"observations/images/{camera}", [render(p, run["entry"], camera, look, rng) for p in pose], layout
            )
        if phase:
            f.create_dataset("phase", data=phases, compression="gzip")
        if timestamp:
            f.create_dataset("timestamp", data=(np.arange(1, n + 1) / HZ).astype(np.float32), compression="gzip")
        if instruction:
            f.create_dataset("language_instruction", data=INSTRUCTION)
    return path


def write_insertion_sim(folder, episodes=4, seed=0, **form):
    """write_insertion as guide 2's simulator records: joint targets, metres, no instruction. The wrist also turns home while it aligns, so that all six
    joints have something to do; yaw cannot be seen, so the pictures stay true."""
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
    """A smooth, invertible stand-in for the arm's inverse kinematics: (N, 6) pose in mm/rad -> (N, 6) joint angles in rad."""
    x, y, z = pose[:, 0] / 100, pose[:, 1] / 100, pose[:, 2] / 100
    return np.stack(
        [np.arctan2(y, x + 2), 0.8 * z - 0.3 * x, 0.6 * x + 0.4 * z, pose[:, 3], pose[:, 4], pose[:, 5] + 0.2 * y],
        axis=1,
    )


def jpeg(image, quality=95):
    """(H, W, 3) uint8 RGB -> JPEG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _write_images(f, key, images, layout):
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


# ---- backbones -------------------------------------------------------------------------------------------------------

QWEN_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ACTION_TOKENS = 2048
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(specials, merges_from=()):
    """A byte-level BPE `tokenizers.Tokenizer`: 256 byte symbols, no merges (or merges learned from the texts `merges_from`), then `specials`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if merges_from:
        tokenizer.train_from_iterator(
            merges_from, trainers.BpeTrainer(vocab_size=400, initial_alphabet=symbols, show_progress=False)
        )
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    return tokenizer


def write_qwen2_5_vl(folder, seed=0, text=(128, 2), vision=(96, 2), action_tokens=True, init=0.06):
    """A tiny random Qwen2.5-VL directory that AutoTokenizer, AutoImageProcessor and from_pretrained open like the real one.

    `text`, `vision` = (width, layers). With `action_tokens` the tokenizer has NORA's <robot_action_0> .. <robot_action_2047>.
    """
    import torch
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = byte_level_tokenizer(
        QWEN_SPECIALS, merges_from=[INSTRUCTION, "You are a helpful assistant.", "system", "user", "assistant"] * 3
    )
    if action_tokens:
        raw.add_tokens([AddedToken(f"<robot_action_{i}>", normalized=False) for i in range(ACTION_TOKENS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    ids = {s: raw.token_to_id(s) for s in QWEN_SPECIALS}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            dict(
                image_processor_type="Qwen2VLImageProcessor",
                patch_size=14,
                temporal_patch_size=2,
                merge_size=2,
                min_pixels=3136,
                max_pixels=1003520,
                image_mean=[0.48145466, 0.4578275, 0.40821073],
                image_std=[0.26862954, 0.26130258, 0.27577711],
            ),
            indent=2,
        )
    )
    width, layers = text
    half = width // 8 // 2  # 8 heads; the three rope sections add up to half a head
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=raw.get_vocab_size(),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=1e6,
                mrope_section=[half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8],
            ),
            tie_word_embeddings=True,
            initializer_range=init,
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
        ),
        vision_config=dict(
            depth=vision[1],
            hidden_size=vision[0],
            intermediate_size=2 * vision[0],
            num_heads=4,
            out_hidden_size=width,
            initializer_range=init,
            fullatt_block_indexes=list(range(1, vision[1])),
            window_size=112,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


SMOLVLM_SPECIALS = [
    "<pad>",
    "<unk>",
    "<bos>",
    "<eos>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
]


def write_smolvlm2(folder, seed=0, text=(96, 4), vision=(96, 2), image_size=64, patch=16, shuffle=1, init=0.06):
    """A tiny random SmolVLM2 directory that AutoConfig, AutoTokenizer and from_pretrained open like the real one.

    `text`, `vision` = (width, layers); a picture of image_size pixels becomes (image_size / patch / shuffle)^2 tokens.
    """
    import torch
    from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = byte_level_tokenizer(
        SMOLVLM_SPECIALS, merges_from=[INSTRUCTION + "\n", "Insert needle into eye trocar in simulation\n"] * 3
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=8192,
    ).save_pretrained(folder)
    about = json.loads(
        (folder / "tokenizer_config.json").read_text()
    )  # the class and the named specials that LeRobot's transformers 4 looks for
    about |= dict(
        tokenizer_class="PreTrainedTokenizerFast",
        extra_special_tokens=dict(
            image_token="<image>",
            fake_image_token="<fake_token_around_image>",
            global_image_token="<global-img>",
            end_of_utterance_token="<end_of_utterance>",
        ),
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
    ids = {s: raw.token_to_id(s) for s in SMOLVLM_SPECIALS}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            dict(
                image_processor_type="SmolVLMImageProcessor",
                processor_class="SmolVLMProcessor",
                do_convert_rgb=True,
                do_image_splitting=True,
                do_normalize=True,
                do_pad=True,
                do_rescale=True,
                do_resize=True,
                image_mean=[0.5] * 3,
                image_std=[0.5] * 3,
                max_image_size=dict(longest_edge=image_size),
                size=dict(longest_edge=image_size),
                resample=1,
                rescale_factor=1 / 255,
            ),
            indent=2,
        )
    )
    (folder / "processor_config.json").write_text(
        json.dumps(
            dict(processor_class="SmolVLMProcessor", image_seq_len=(image_size // patch // shuffle) ** 2), indent=2
        )
    )
    config = SmolVLMConfig(
        text_config=dict(
            model_type="llama",
            hidden_size=text[0],
            intermediate_size=2 * text[0],
            num_hidden_layers=text[1],
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=text[0] // 6 // 2 * 2,
            vocab_size=raw.get_vocab_size(),
            rms_norm_eps=1e-5,
            initializer_range=init,
            pad_token_id=ids["<pad>"],
            bos_token_id=ids["<bos>"],
            eos_token_id=ids["<eos>"],
            tie_word_embeddings=False,
        ),
        vision_config=dict(
            hidden_size=vision[0],
            intermediate_size=2 * vision[0],
            num_hidden_layers=vision[1],
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch,
            initializer_range=init,
        ),
        scale_factor=shuffle,
        image_token_id=ids["<image>"],
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write_fast(folder, seed=0, horizon=10, dim=6, vocab_size=1024, scale=10):
    """A FAST tokenizer directory in the public file layout (processor_config.json + tokenizer.json), fitted on smooth random chunks the way the
    public one is: the alphabet is chr(0) .. chr(max - min), so byte symbols that no coefficient used are missing (reference/nora.md section 3)."""
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
    bpe.train_from_iterator(
        ["".join(map(chr, c.ravel() - q.min())) for c in q],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[],
            initial_alphabet=alphabet,
            max_token_length=10000,
            show_progress=False,
        ),
    )
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "processor_config.json").write_text(
        json.dumps(
            dict(
                action_dim=None,
                auto_map={"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"},
                min_token=int(q.min()),
                processor_class="UniversalActionProcessor",
                scale=scale,
                time_horizon=None,
                vocab_size=bpe.get_vocab_size(),
            ),
            indent=2,
        )
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False), indent=2)
    )
    return folder


# ---- VAMOS (parquet) and OpenVLA -------------------------------------------------------------------------------------

POSTS = {"red": (230, 40, 35), "blue": (40, 60, 235)}
POST_M = (0.7, 1.2)  # width, height of a post
VAMOS_CAMERA = dict(height_m=0.5, focal=0.9)  # focal length in image widths; looks straight ahead, x forward, y left


def vamos_row(rng, size, other_instruction=0.7):
    """One outdoor picture with two coloured posts -> list of one or two rows (dicts in VAMOS' columns): the same picture, another post in the instruction, another path.
    A path is 6 to 24 equal steps, so the velocity of a step is the way to the post / 15 and can only be known from picture and instruction together."""
    height, width = size
    names = list(rng.permutation(list(POSTS)))
    places = {}
    for side, name in zip(rng.permutation([-1, 1]), names):  # one on either side, so that one never hides the other
        x = rng.uniform(2.5, 6.0)
        places[name] = (x, side * rng.uniform(0.1, 0.42) * x)
    focal, horizon = VAMOS_CAMERA["focal"] * width, 0.42 * height
    project = lambda x, y, z: (width / 2 - focal * y / x, horizon + focal * (VAMOS_CAMERA["height_m"] - z) / x)  # noqa: E731
    sky, grass = np.array([150, 180, 215]) + rng.uniform(-15, 15, 3), np.array([95, 125, 75]) + rng.uniform(-15, 15, 3)
    pixels = np.where((np.arange(height) < horizon)[:, None, None], sky, grass) + rng.normal(0, 4, (height, width, 3))
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for name, (x, y) in sorted(places.items(), key=lambda item: -item[1][0]):  # the far one first
        (left, top), (right, bottom) = project(x, y + POST_M[0] / 2, POST_M[1]), project(x, y - POST_M[0] / 2, 0)
        draw.rectangle(
            [left, top, right, bottom],
            fill=tuple(int(v) for v in np.clip(np.array(POSTS[name]) + rng.uniform(-15, 15, 3), 0, 255)),
        )
    encoded, rows = jpeg(np.asarray(picture), 90), []
    for name in names[: 2 if rng.random() < other_instruction else 1]:
        (x, y), steps = places[name], int(rng.integers(6, 25))
        path = np.arange(steps + 1)[:, None] * (np.array([[x, y]]) / 15) + np.pad(
            rng.normal(0, 0.004, (steps, 2)).cumsum(0), ((1, 0), (0, 0))
        )
        path = np.concatenate([path, np.full((steps + 1, 1), 0.01)], axis=1)
        u, v = project(x, y, 0)
        rows.append(
            dict(
                image=dict(bytes=encoded, path=None),
                trajectory_3d=path.tolist(),
                trajectory_2d=[[int(c) for c in project(max(p[0], 0.3), p[1], 0)] for p in path],
                horizon=len(path),
                text=f"Navigate to x=<loc{int(u / width * 1023):04d}>, y=<loc{int(min(v / height, 1) * 1023):04d}>",
                lang_goal=f"Go to the {name} post",
            )
        )
    return rows


def write_vamos(folder, images=1500, validation_images=60, seed=0, size=(112, 160), files=4, rows_per_group=100):
    """A VAMOS-format data set: `images` pictures in `files` train-*.parquet, `validation_images` in one validation-*.parquet. A few rows are as broken as in real
    recordings: a path of one point, a missing instruction."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    point = pa.list_(pa.list_(pa.float64()))
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("trajectory_2d", pa.list_(pa.list_(pa.int64()))),
            ("trajectory_3d", point),
            ("horizon", pa.int64()),
            ("text", pa.string()),
            ("lang_goal", pa.string()),
        ]
    )
    (Path(folder) / "data").mkdir(parents=True, exist_ok=True)
    paths = []
    for part, count, number in (("train", images, files), ("validation", validation_images, 1)):
        for f in range(number):
            rng = np.random.default_rng([seed, part == "train", f])
            rows = [row for _ in range(count * (f + 1) // number - count * f // number) for row in vamos_row(rng, size)]
            rows = [rows[i] for i in rng.permutation(len(rows))]
            if part == "train" and f == 0:
                rows[1]["trajectory_3d"], rows[2]["lang_goal"] = rows[1]["trajectory_3d"][:1], None
            paths.append(Path(folder) / "data" / f"{part}-{f:05d}-of-{number:05d}.parquet")
            pq.write_table(pa.Table.from_pylist(rows, schema), paths[-1], row_group_size=rows_per_group)
    return paths


def llama_tokenizer(words):
    """A `tokenizers.Tokenizer` in the form of Llama 2's: 32,000 pieces, bytes as <0x..>, 29871 = "▁", 31744 .. 31999 single characters. Every word of `words` is one piece,
    all else falls apart into characters or bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    merges = []
    for word in dict.fromkeys(words):
        for n in range(2, len(word) + 2):
            if (merge := (("▁" + word)[: n - 1], ("▁" + word)[n - 1])) not in merges:
                merges.append(merge)
    pieces += ["".join(m) for m in merges]
    letters = ["▁", *(chr(c) for c in range(33, 127))]
    pieces += [f"<filler_{i}>" for i in range(29871 - len(pieces))] + letters
    pieces += [chr(0x4E00 + i) for i in range(32000 - len(pieces))]
    raw = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    raw.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in ("<unk>", "<s>", "</s>", "<PAD>")])
    return raw


def write_openvla(folder, seed=0, text=(64, 3), dino=(48, 2), siglip=(48, 2), image_size=84, shards=2):
    """A tiny random OpenVLA directory in the file layout of openvla/openvla-7b: config, image processor, Llama tokenizer, `shards` safetensors with their index.

    `text`, `dino`, `siglip` = (width, layers); of a tower's layers the last one is never run. No Python files: ours belong to modeling_openvla.py.
    """
    import torch
    from safetensors.torch import save_file

    from modeling_openvla import OpenVLAConfig, OpenVLAForActionPrediction, prompt_of

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json = lambda name, value: (folder / name).write_text(json.dumps(value, indent=2))  # noqa: E731
    tokenizer = json.loads(
        llama_tokenizer((prompt_of("") + " go to the red blue post").replace("?\nOut:", "").split()).to_str()
    )
    tokenizer["model"]["merges"] = [
        " ".join(pair) for pair in tokenizer["model"]["merges"]
    ]  # the older of two spellings, as in openvla-7b: transformers 4.40 reads no other
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    special = {
        k: dict(content=v, lstrip=False, normalized=False, rstrip=False, single_word=False)
        for k, v in dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<PAD>").items()
    }
    write_json("special_tokens_map.json", special)
    write_json("added_tokens.json", {"<PAD>": 32000})
    write_json(
        "tokenizer_config.json",
        dict(
            add_bos_token=True,
            add_eos_token=False,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="<PAD>",
            clean_up_tokenization_spaces=False,
            legacy=False,
            model_max_length=2048,
            padding_side="right",
            processor_class="PrismaticProcessor",
            sp_model_kwargs={},
            tokenizer_class="LlamaTokenizer",
            use_default_system_prompt=False,
            added_tokens_decoder={
                str(i): special[k] | dict(special=True)
                for k, i in dict(unk_token=0, bos_token=1, eos_token=2, pad_token=32000).items()
            },
        ),
    )
    sizes = [[3, image_size, image_size]] * 2
    means, stds = [[0.484375, 0.455078125, 0.40625], [0.5] * 3], [[0.228515625, 0.2236328125, 0.224609375], [0.5] * 3]
    write_json(
        "preprocessor_config.json",
        dict(
            image_processor_type="PrismaticImageProcessor",
            processor_class="PrismaticProcessor",
            image_resize_strategy="resize-naive",
            input_sizes=sizes,
            interpolations=["bicubic"] * 2,
            means=[[0.485, 0.456, 0.406], [0.5] * 3],
            stds=[[0.229, 0.224, 0.225], [0.5] * 3],
            tvf_crop_params=[dict(output_size=s[1:]) for s in sizes],
            tvf_do_letterbox=False,
            tvf_letterbox_fill=None,
            tvf_normalize_params=[dict(mean=m, std=s, inplace=False) for m, s in zip(means, stds)],
            tvf_resize_params=[dict(size=s[1:], interpolation=3, max_size=None, antialias=True) for s in sizes],
            use_fused_vision_backbone=True,
        ),
    )
    config = dict(
        architectures=["OpenVLAForActionPrediction"],
        model_type="openvla",
        arch_specifier="no-align+fused-gelu-mlp",
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="llama2-7b-pure",
        hf_llm_id="meta-llama/Llama-2-7b-hf",
        image_resize_strategy="resize-naive",
        image_sizes=[image_size] * 2,
        timm_override_act_layers=[None, None],
        timm_model_ids=["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        use_fused_vision_backbone=True,
        n_action_bins=256,
        llm_max_length=2048,
        pad_token_id=32000,
        pad_to_multiple_of=64,
        output_projector_states=False,
        norm_stats={"demo_arm": {"action": dict(q01=[-1.0] * 7, q99=[1.0] * 7, mask=[True] * 6 + [False])}},
        torch_dtype="float32",
        text_config=dict(
            model_type="llama",
            vocab_size=32064,
            pad_token_id=32000,
            torch_dtype="float32",
            hidden_size=text[0],
            intermediate_size=2 * text[0],
            num_hidden_layers=text[1],
            num_attention_heads=4,
            num_key_value_heads=4,
        ),
        vision_sizes=dict(
            featurizer=dict(embed_dim=dino[0], depth=dino[1], num_heads=4, mlp_ratio=2.0),
            fused_featurizer=dict(embed_dim=siglip[0], depth=siglip[1], num_heads=4, mlp_ratio=2.0),
        ),
    )
    write_json("config.json", config)
    write_json(
        "generation_config.json", dict(_from_model_config=True, bos_token_id=1, eos_token_id=2, pad_token_id=32000)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OpenVLAForActionPrediction(OpenVLAConfig(**config))
        with torch.no_grad():
            for (
                name,
                p,
            ) in (
                model.named_parameters()
            ):  # a random tower that tells places and colours apart; 0.02 would be nearly blind at this width
                if p.ndim > 1 and "norm" not in name:
                    p.normal_(0, 0.3 if p.ndim == 3 or "embed_tokens" in name else p[0].numel() ** -0.5)
            # what a pretrained model knows and 2,000 pictures cannot teach: that neighbouring action tokens mean neighbouring actions
            u, wave = torch.linspace(-1, 1, 256)[:, None], torch.rand(2, text[0]) * torch.tensor([[4.0], [2.0]])
            curve = torch.cos(torch.pi * (u * wave[0] + wave[1]))
            for weight, norm in (
                (model.get_input_embeddings().weight, 0.4),
                (model.get_output_embeddings().weight, 2 * text[0] ** -0.5),
            ):
                weight[model.action_begin : model.action_end] = norm * curve
    tensors, split, index = model.state_dict(), {}, {}
    for i, name in enumerate(tensors):
        index[name] = f"model-{i * shards // len(tensors) + 1:05d}-of-{shards:05d}.safetensors"
        split.setdefault(index[name], {})[name] = tensors[name].contiguous()
    for name, shard in split.items():
        save_file(shard, folder / name, metadata={"format": "pt"})
    write_json(
        "model.safetensors.index.json",
        dict(metadata=dict(total_size=sum(t.numel() * 4 for t in tensors.values())), weight_map=index),
    )
    return folder


# ---- mobile base (HDF5) and Kosmos-2 ---------------------------------------------------------------------------------
# A base that drives without turning sees two bottles, one on its left and one on its right, and a box between them. The instruction says which one to
# drive to, and nothing else does: every scene is recorded twice, with opposite motion. How far, and when to stop, is in the pictures.

MOBILE_SPEED = 1.15  # what a key sends per axis; one key is one frame and moves the base by MOBILE_STEP
MOBILE_STEP = 0.13  # m
MOBILE_FRAMES = 18  # the recorder's length
MOBILE_GOAL = "Navigate around obstacles and reach the front of the beverage bottle on the"


def write_mobile(folder, episodes=200, seed=0, size=(72, 128), colour_order="bgr", frames=MOBILE_FRAMES):
    """`episodes` recordings (even ones left, odd ones right, two of a scene in a row) in the file form of the mobile recorder: images gzip in OpenCV's order, the action of
    a key beside the picture taken after it was sent, a motionless frame 0. Every fifth file lacks its language_instruction: its name tells the side."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in tqdm(range(episodes), desc="mobile episodes", unit="episode", disable=None):
        rng, side = np.random.default_rng([seed, 7, i // 2]), ("left", "right")[i % 2]
        bottles = np.array(
            [[rng.uniform(1.6, 2.4), rng.uniform(0.4, 0.95)], [rng.uniform(1.6, 2.4), -rng.uniform(0.4, 0.95)]]
        )  # m forward, m to the left
        look = dict(
            box=np.array([rng.uniform(1.1, 1.5), rng.uniform(-0.12, 0.12)]),
            floor=rng.uniform(0.25, 0.6, 3),
            wall=rng.uniform(0.5, 0.8, 3),
            bottle=rng.uniform(-0.1, 0.1, 3),
        )
        at, goal, actions, images = np.zeros(2), bottles[i % 2] - [0.45, 0.0], [], []
        for t in range(frames):
            gap = goal - at
            key = np.where(np.abs(gap) > MOBILE_STEP / 2, np.sign(gap), 0.0) if t else np.zeros(2)
            at = at + MOBILE_STEP / 2 * key  # the picture is taken while the base moves: after the command
            images.append(render_mobile(at, bottles, look, size, rng))
            at = at + MOBILE_STEP / 2 * key
            actions.append([*(MOBILE_SPEED * key), 0.0])
        if colour_order == "bgr":
            images = [image[..., ::-1] for image in images]
        paths.append(
            folder / f"episode_20251115_{i // 3600:02d}{i // 60 % 60:02d}{i % 60:02d}_1box_hori_{side}_core_medium.h5"
        )
        with h5py.File(paths[-1], "w") as f:
            f.create_dataset("images", data=np.stack(images), compression="gzip", chunks=(1, *size, 3))
            f.create_dataset("actions", data=np.array(actions, np.float32), compression="gzip")
            f.create_dataset(
                "action_event_types",
                data=["episode_start"] + ["start_action"] * (frames - 1),
                dtype=h5py.string_dtype(),
            )
            if i % 5:
                f.create_dataset("language_instruction", data=np.array([f"{MOBILE_GOAL} {side}".encode()], "S256"))
            f.attrs.update(
                episode_name=paths[-1].stem, num_frames=frames, total_duration=float(frames), action_chunk_size=8
            )
    return paths


def render_mobile(at, bottles, look, size, rng):
    """-> (H, W, 3) uint8 RGB: what the camera of a base at `at` (m forward, m to the left) sees, looking forward."""
    height, width = size
    picture = Image.new("RGB", (width, height), tuple((look["wall"] * 255).astype(int)))
    draw, horizon = ImageDraw.Draw(picture), 0.35 * height
    draw.rectangle([0, horizon, width, height], fill=tuple((look["floor"] * 255).astype(int)))

    def upright(where, tall, wide, colour):
        away, left = np.maximum(where[0] - at[0], 0.15), where[1] - at[1]
        k, x, foot = (
            0.55 * width / away,
            width / 2 - 0.55 * width * left / away,
            horizon + 0.22 * width / away,
        )  # pixels per m
        draw.rectangle(
            [x - wide / 2 * k, foot - tall * k, x + wide / 2 * k, foot],
            fill=tuple((np.clip(colour, 0, 1) * 255).astype(int)),
        )

    for where, thing in sorted(
        [(tuple(b), "bottle") for b in bottles] + [(tuple(look["box"]), "box")], reverse=True
    ):  # far ones first
        if thing == "box":
            upright(where, 0.18, 0.3, np.array([0.55, 0.35, 0.15]))
        else:
            upright(where, 0.3, 0.12, np.array([0.1, 0.65, 0.2]) + look["bottle"])
            upright(where, 0.12, 0.12, np.array([0.85, 0.1, 0.1]) + look["bottle"])
    return np.clip(np.asarray(picture, np.float32) + rng.normal(0, 2, (height, width, 3)), 0, 255).astype(np.uint8)


KOSMOS_TAGS = [
    "</doc>",
    "<image>",
    "</image>",
    "</chunk>",
    "</line>",
    "<phrase>",
    "</phrase>",
    "<object>",
    "</object>",
    "</delimiter_of_multi_objects/>",
    "<grounding>",
]


def write_kosmos2(folder, seed=0, text=(96, 2), vision=(96, 2), image_size=56, patch=14, queries=24):
    """A tiny random Kosmos-2 directory that AutoTokenizer and Kosmos2Model.from_pretrained open like the real one. `text`, `vision` = (width, layers).

    The tokenizer has the real one's form (unigram pieces, <s> 0, <pad> 1, </s> 2, <unk> 3, the tags behind all pieces) without the 1024 patch tokens. Nothing of a random tower is
    trained, so its weights are drawn such that the image tokens keep what the pictures show: with the usual ones they are all alike.
    """
    import torch
    from tokenizers import AddedToken
    from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration, XLMRobertaTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({w for t in (f"{MOBILE_GOAL} left right", "Navigate to the target location") for w in t.split()})
    pieces = [f"▁{w}" for w in words] + ["▁"] + [chr(c) for c in range(33, 127) if chr(c) not in "<>"]
    tokenizer = XLMRobertaTokenizer(
        vocab=[(s, 0.0) for s in ("<s>", "<pad>", "</s>", "<unk>")]
        + [(p, -1.0 if len(p) > 1 else -9.0) for p in pieces]
    )
    tokenizer.add_tokens([AddedToken(t, lstrip=True, rstrip=False, normalized=False) for t in KOSMOS_TAGS])
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            dict(
                image_processor_type="CLIPImageProcessor",
                processor_class="Kosmos2Processor",
                do_center_crop=True,
                do_convert_rgb=True,
                do_normalize=True,
                do_rescale=True,
                do_resize=True,
                rescale_factor=1 / 255,
                resample=3,
                crop_size=dict(height=image_size, width=image_size),
                size=dict(height=image_size, width=image_size),
                image_mean=[0.48145466, 0.4578275, 0.40821073],
                image_std=[0.26862954, 0.26130258, 0.27577711],
            ),
            indent=2,
        )
    )
    config = Kosmos2Config(
        text_config=dict(
            vocab_size=len(tokenizer),
            embed_dim=text[0],
            layers=text[1],
            ffn_dim=2 * text[0],
            attention_heads=4,
            max_position_embeddings=512,
            init_std=0.1,
        ),
        vision_config=dict(
            hidden_size=vision[0],
            intermediate_size=2 * vision[0],
            num_hidden_layers=vision[1],
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch,
        ),
        latent_query_num=queries,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Kosmos2ForConditionalGeneration(config)
        vision_tower, projection, normal = (
            model.vision_model.model,
            model.image_to_text_projection,
            torch.nn.init.normal_,
        )
        normal(model.text_model.model.embed_tokens.weight, std=1.0)  # as loud as the image tokens
        normal(vision_tower.embeddings.position_embedding.weight, std=1.0)
        normal(vision_tower.embeddings.patch_embedding.weight, std=1 / patch / 3**0.5)
        for layer in vision_tower.encoder.layers:
            for linear in (
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
                layer.self_attn.out_proj,
                layer.mlp.fc1,
                layer.mlp.fc2,
            ):
                normal(
                    linear.weight, std=0.5 / vision[0] ** 0.5
                )  # the patches stay what they are, with a little of the others
        normal(projection.dense.weight, std=3.0)  # what comes in is L2-normalised
        for name, std in (("q_proj", 0.3), ("k_proj", 0.3), ("v_proj", text[0] ** -0.5), ("out_proj", text[0] ** -0.5)):
            normal(getattr(projection.x_attn, name).weight, std=std)  # sharp: every query looks at a few patches
        model.save_pretrained(folder)
    return folder


# ---- robot sessions: CSV, npz and images, as guide 5's recorders write them ----------------------------------------------
# The phantom stands on a turntable: the tip chases a trocar that goes round, and follows tissue that breathes. Where the trocar is can be seen: the
# tool camera looks at a mat, fixed to the trocar, whose red rises to the right and blue to the bottom. Where the tissue is in its cycle can only be
# felt: force and the A-scan's peak follow it. Recordings without a sensor are of a stiff phantom, so they have nothing to feel.

TISSUE_MM, TISSUE_HZ, TABLE_HZ = 4.0, 0.9, 0.35
CSV_COLUMNS = "recv_timestamp,origin_timestamp,send_timestamp,{force},joint_1,joint_2,joint_3,joint_4,joint_5,joint_6,pose_x,pose_y,pose_z,pose_a,pose_b,pose_r"


def simulate_session(rng, seconds, breathes=True):
    """-> dict(t (n,) s at 100 Hz, pose (n, 6) mm and degrees, offset (n, 2) mm from the trocar to the tip, phase: function of seconds -> tissue's phase in rad)."""
    t = np.arange(int(seconds * 100)) / 100
    hz, start = TISSUE_HZ + rng.uniform(-0.04, 0.04), rng.uniform(0, 2 * np.pi)
    angle = 2 * np.pi * TABLE_HZ * t + rng.uniform(0, 2 * np.pi)
    trocar = rng.uniform(10, 15) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    xy, here = np.zeros((len(t), 2)), trocar[0] + rng.uniform(-10, 10, 2)
    for i in range(len(t)):
        xy[i] = here
        here = here + 2.5 * (trocar[i] - here) / 100  # per second 2.5 times the way that is left
    offset, xy = xy - trocar, xy + [80.0, 118.0]
    z = 245 + (TISSUE_MM * np.sin(2 * np.pi * hz * t + start) if breathes else 0 * t)
    tilt = np.stack(
        [-150 + 0.3 * (xy[:, 1] - 118), 43 - 0.3 * (xy[:, 0] - 80), 179 + 0.3 * (xy[:, 0] - 80)], axis=1
    )  # the last one crosses 180
    return dict(
        t=t,
        pose=np.concatenate([xy, z[:, None], (tilt + 180) % 360 - 180], axis=1),
        offset=offset,
        phase=lambda s: 2 * np.pi * hz * s + start,
    )


def session_sensor(run, stamps, rng):
    """Seconds (n,) -> force (n,) float32 and A-scan (n, 1025) float32 with a peak at the tissue."""
    height = np.sin(run["phase"](stamps))
    bins = np.arange(1025)
    ascan = (
        45 + 60 * np.exp(-(((bins - 500 - 120 * height[:, None]) / 25) ** 2)) + rng.integers(0, 4, (len(stamps), 1025))
    )
    return (1 + 0.8 * height + rng.normal(0, 0.03, len(stamps))).astype(np.float32), np.rint(ascan).astype(np.float32)


def render_session(offset, view, size, rng):
    """-> (H, W, 3) uint8. View1: tool camera, 12 mm wide, over the tip. View5: the whole table, grey, with trocar and tip."""
    height, width = size
    scale = width / (12 if view == "View1" else 80)  # pixels per mm
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    x, y = (xs - width / 2) / scale + offset[0], (ys - height / 2) / scale + offset[1]  # mm from the trocar
    if view == "View1":
        mat = np.stack([0.5 + 0.025 * x, np.full_like(x, 0.4), 0.5 + 0.025 * y], axis=-1)
    else:
        mat = np.full((height, width, 3), 0.5, np.float32)
        x, y = (xs - width / 2) / scale, (ys - height / 2) / scale
        mat[(x - offset[0]) ** 2 + (y - offset[1]) ** 2 < 9] = (1.0, 0.9, 0.1)  # the tip
    mat[x**2 + y**2 < 4] = (0.1, 0.8, 0.9)  # the trocar
    return np.clip(mat * 255 + rng.normal(0, 4, mat.shape), 0, 255).astype(np.uint8)


def write_session(folder, layout, seed=0, seconds=6.0, sensor=True, size=(72, 128), image_hz=5.0, start=1761551500.0):
    """One recording in `folder` (its name is the recording's) in layout "old", "new" or "legacy". Clock: `start`, epoch seconds."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    run = simulate_session(rng, seconds, breathes=sensor)
    t, pose, stamp = (
        run["t"],
        run["pose"],
        "20251027_" + f"{int(start) % 86400 // 3600:02d}{int(start) % 3600 // 60:02d}{int(start) % 60:02d}",
    )
    origin = start + np.rint(np.floor(t / 0.005) * 0.005 * 1000) / 1000
    received = origin + 0.0004 + 0.002 * rng.random(len(t))
    joints = np.degrees(joint_angles(np.concatenate([pose[:, :3], np.radians(pose[:, 3:])], axis=1)))
    if layout == "legacy":
        header, name = (
            "timestamp,joint_angle_1,joint_angle_2,joint_angle_3,joint_angle_4,joint_angle_5,joint_angle_6,EE_x,EE_y,EE_z,EE_a,EE_b,EE_r",
            f"robot_rt_{stamp}.csv",
        )
        table = np.column_stack([origin, joints, pose])
    else:
        header, name = (
            CSV_COLUMNS.format(force="force" if layout == "new" else "force_placeholder"),
            "robot_states.csv" if layout == "new" else f"robot_state_{stamp}.csv",
        )
        table = np.column_stack([received, origin, origin + 0.0003, 0 * t, joints, pose])
    np.savetxt(folder / name, table, "%.17g", ",", header=header, comments="")
    if sensor:
        first = 0.02
        rows = first + np.arange(int((seconds - first) * 650)) / 650
        force, ascan = session_sensor(run, rows, rng)
        if layout == "new":  # a window of the newest 650 rows every 200 ms of the saver's clock
            ends, end = [], 649
            while end < len(rows):
                ends.append(end)
                end += int(rng.integers(126, 135))
            data = np.stack([np.column_stack([force[e - 649 : e + 1], ascan[e - 649 : e + 1]]) for e in ends])
            np.savez_compressed(folder / "sensor_data.npz", timestamps=start + rows[ends], data=data)
        else:
            np.savez(
                folder / f"sensor_data_{stamp}_{int(start)}.npz",
                timestamps=start + rows,
                send_timestamps=start + rows + 0.001,
                forces=force,
                alines=ascan,
            )
    for view in ("View1", "View5"):
        place = {
            "old": f"{view}/left" if view == "View1" else view,
            "new": f"images/{view}",
            "legacy": "view1/left" if view == "View1" else "view5_oak",
        }[layout]
        (folder / place).mkdir(parents=True, exist_ok=True)
        for n in range(int(seconds * image_hz)):
            taken = n / image_hz + 0.01 * rng.random()
            shown = (
                f"{start + taken:.6f}"
                if layout == "new"
                else f"{'zed_41182735_left' if view == 'View1' else 'oak_1844301'}_{start + taken:.3f}"
            )
            picture = render_session(run["offset"][min(int(taken * 100), len(t) - 1)], view, size, rng)
            (folder / place / f"{shown}.jpg").write_bytes(jpeg(picture, 90))
    if layout == "new":
        (folder / "metadata.json").write_text(
            json.dumps(
                dict(
                    episode_name=folder.name,
                    start_time=start,
                    end_time=start + seconds,
                    camera_views=["View5", "View1"],
                    sensor_hz=650,
                    robot_hz=100,
                    sensor_window_size=650,
                    action_horizon=8,
                    action_dim=7,
                ),
                indent=2,
            )
        )
    return folder


def write_sessions(folder, seed=0, white=16, needle=5, new=10, oct=4, seconds=6.0, size=(72, 128)):
    """Data sets of all layouts below `folder`: `white` and `new` recordings with sensor, `needle` and `oct` without. 2.7 MB per second and sensor."""
    folder, i = Path(folder), 0
    plans = [("White_silicone_white_circle/recv_all_{}", "old", True, 4.0)] * white + [
        ("Needle_insertion_eye_trocar/recv_all_{}", "old", False, 4.0)
    ] * needle
    plans += [
        (f"Make_dataset/New_dataset/{('Blue_point', 'Eye_trocar')[n % 2]}/episode_{{}}", "new", True, 5.0)
        for n in range(new)
    ] + [("OCT_insertion/Captures{}", "legacy", False, 4.0)] * oct
    for i, (name, layout, sensor, hz) in enumerate(tqdm(plans, desc="sessions", unit="recording", disable=None)):
        clock = 1761551500 + 60 * i
        when = f"20251027_{clock % 86400 // 3600:02d}{clock % 3600 // 60:02d}{clock % 60:02d}"
        write_session(
            folder / name.format(i + 1 if layout == "legacy" else when),
            layout,
            seed * 10007 + i,
            seconds,
            sensor,
            size,
            hz,
            float(clock),
        )
    return folder


# ---- what can be made: name -> function(folder, args). A new format is one function and one line here ------------------

PARTS = {
    "insertion": lambda folder, args: write_insertion(folder / "insertion", args.episodes, args.seed),
    "qwen2_5_vl": lambda folder, args: write_qwen2_5_vl(folder / "qwen2_5_vl", args.seed),
    "insertion_sim": lambda folder, args: write_insertion_sim(folder / "insertion_sim", args.episodes, args.seed),
    "smolvlm2": lambda folder, args: write_smolvlm2(folder / "smolvlm2", args.seed),
    "fast": lambda folder, args: write_fast(folder / "fast", args.seed),
    "vamos": lambda folder, args: write_vamos(folder / "vamos", seed=args.seed),
    "openvla": lambda folder, args: write_openvla(folder / "openvla", args.seed),
    "mobile": lambda folder, args: write_mobile(folder / "mobile", args.episodes, args.seed),
    "kosmos2": lambda folder, args: write_kosmos2(folder / "kosmos2", args.seed),
    "sessions": lambda folder, args: write_sessions(folder / "sessions", args.seed),
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
        PARTS[part](Path(args.out), args)
        print(f"{part}: {Path(args.out) / part}")


if __name__ == "__main__":
    main()
