"""Write small data sets in every recording format, and tiny random backbones in their real file formats.

One seeded scene feeds all of them: a needle tip approaches a trocar on an eye phantom, lines up with it and enters. It is rendered by
pinhole projection into side, tool and top cameras under domain randomisation (light, camera, colours, background, noise: guide 2). Where
the trocar is, and therefore what to do next, can be seen in the images and in nothing else; the frame number tells nothing.

    python make_demo.py                                   # everything below demo/
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

HZ = 14.9                      # the simulator's frame rate: a frame every 67 physics steps of 1 ms
ALIGN_MM, ALIGN_RAD = 3.0, 0.06     # largest motion of one frame while aligning
INSERT_MM = 1.6                # advance of one frame while inserting
STANDOFF_MM, DEPTH_MM = 8.0, 9.0   # where inserting starts above the entry, and where it ends below it
INSTRUCTION = "Insert the needle into the target point"
SUPERSAMPLE = 2                # drawn at twice the size, then reduced: cheap antialiasing
CAMERAS = {                    # name: (position mm, looks at mm, focal length in image heights)
    "side_camera": ((0.0, -150.0, 28.0), (0.0, 0.0, 14.0), 1.7),
    "tool_camera": ((0.0, -62.0, 70.0), (0.0, 4.0, 0.0), 0.85),    # rides on the stage: relative to the tip, does not tilt with it
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
    pose = np.array([*(target[:2] + rng.uniform(-24, 24, 2)), target[2] + rng.uniform(2, 22), *rng.uniform(-0.45, 0.45, 2), rng.uniform(-1, 1)])
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
    ys, xs = np.mgrid[-1:1:height * SUPERSAMPLE * 1j, -1:1:width * SUPERSAMPLE * 1j].astype(np.float32)
    look = dict(light=rng.uniform(0.85, 1.15), jitter=rng.uniform(-2, 2, (3, 3)), tilt=rng.uniform(-0.02, 0.02, (3, 2)), color=rng.uniform(-0.1, 0.1, (4, 3)), mats=[])
    for _ in CAMERAS:  # a colour-graded table mat: red rises to the right, blue to the bottom
        base, dx, dy = np.array([0.45, 0.4, 0.45]) + rng.uniform(-0.05, 0.05, 3), [0.3, 0.0, 0.0] + rng.uniform(-0.04, 0.04, 3), [0.0, 0.0, 0.3] + rng.uniform(-0.04, 0.04, 3)
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
        return (width / 2 + pixels * (d @ right / z + look["tilt"][index, 0]), height / 2 - pixels * (d @ up / z + look["tilt"][index, 1])), pixels / z

    def color(base, shift):
        return tuple(int(v) for v in np.clip((np.array(base) + look["color"][shift]) * look["light"] * 255, 0, 255))

    def disc(point, radius_mm, fill):
        (x, y), k = project(point)
        draw.ellipse([x - radius_mm * k, y - radius_mm * k, x + radius_mm * k, y + radius_mm * k], fill=fill)

    def rod(a, b, thickness_mm, fill):
        (start, k), (end, _) = project(a), project(b)
        draw.line([*start, *end], fill=fill, width=max(2, int(thickness_mm * k)))

    disc(entry - [0, 0, 16.0], 15.0, color((0.92, 0.88, 0.85), 0))                                  # the eye: a ball below the entry
    rod(entry, entry - [0, 0, 5.0], 6.0, color((0.15, 0.25, 0.85), 1))                              # the trocar's tube
    disc(entry, 4.0, color((0.1, 0.8, 0.9), 2))                                                     # and its mouth
    hub = pose[:3] - 28 * needle_axis(pose)
    rod(pose[:3], hub, 3.0, color((0.95, 0.15, 0.1), 3))
    disc(hub, 4.5, color((0.2, 0.9, 0.2), 3))
    disc(pose[:3], 3.0, color((1.0, 0.9, 0.1), 3))
    image = np.asarray(picture.resize((width // SUPERSAMPLE, height // SUPERSAMPLE), Image.BOX), np.float32)
    return np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)


# ---- insertion episodes (HDF5) ---------------------------------------------------------------------------------------

def write_insertion(folder, episodes=4, seed=0, layout="jpeg", size=(96, 128), position_unit="mm", rotation_unit="rad", action="past_delta",
                    phase=True, instruction=True, timestamp=True, max_frames=None):
    """Episodes in the file form of the insertion recorders.

    layout "jpeg" (variable-length, quality 95), "raw" (contiguous) or "gzip" (chunked, compressed); `action` "past_delta" stores the motion
    already made, as the simulator's collectors do, "joints" the absolute joint targets of the randomised collector. All variants of one seed
    show the same scene, so that readers can be compared across them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    one = functools.partial(_write_insertion_episode, folder, seed=seed, layout=layout, size=size, position_unit=position_unit, rotation_unit=rotation_unit, action=action,
                            phase=phase, instruction=instruction, timestamp=timestamp, max_frames=max_frames)
    bar = functools.partial(tqdm, total=episodes, desc=f"insertion episodes ({layout})", unit="episode", disable=None)
    if episodes < 8:
        return list(bar(map(one, range(episodes))))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return list(bar(pool.imap(one, range(episodes))))


def _write_insertion_episode(folder, i, seed, layout, size, position_unit, rotation_unit, action, phase, instruction, timestamp, max_frames):
    rng = np.random.default_rng([seed, i])
    run, look = simulate(rng), randomise(rng, size)
    pose, phases = run["pose"][:max_frames], run["phase"][:max_frames]
    n, joints, stored = len(pose), joint_angles(pose), pose.copy()
    stored[:, :3] *= 1e-3 if position_unit == "m" else 1.0
    stored[:, 3:] *= 180 / np.pi if rotation_unit == "deg" else 1.0
    past = np.concatenate([np.zeros((1, 6)), np.diff(stored, axis=0)])
    path = folder / f"episode_20260101_{i // 3600:02d}{i // 60 % 60:02d}{i % 60:02d}.h5"
    with h5py.File(path, "w") as f:
        f.create_dataset("action", data=(past if action == "past_delta" else np.concatenate([joints[1:], joints[-1:]])).astype(np.float32), compression="gzip")
        f.create_dataset("observations/ee_pose", data=stored.astype(np.float32), compression="gzip")
        f.create_dataset("observations/qpos", data=(joints + rng.normal(0, 0.001, joints.shape)).astype(np.float32), compression="gzip")
        for camera in CAMERAS:
            _write_images(f, f"observations/images/{camera}", [render(p, run["entry"], camera, look, rng) for p in pose], layout)
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
            turn = home - yaw                                       # of joint 6, see joint_angles
            f["observations/ee_pose"][:, 5] = home
            f["observations/qpos"][:, 5] += turn
            f["action"][:, 5] += np.append(turn[1:], turn[-1])      # the target is the next frame's joint
    return paths


def joint_angles(pose):
    """A smooth, invertible stand-in for the arm's inverse kinematics: (N, 6) pose in mm/rad -> (N, 6) joint angles in rad."""
    x, y, z = pose[:, 0] / 100, pose[:, 1] / 100, pose[:, 2] / 100
    return np.stack([np.arctan2(y, x + 2), 0.8 * z - 0.3 * x, 0.6 * x + 0.4 * z, pose[:, 3], pose[:, 4], pose[:, 5] + 0.2 * y], axis=1)


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

QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
                 "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
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
        tokenizer.train_from_iterator(merges_from, trainers.BpeTrainer(vocab_size=400, initial_alphabet=symbols, show_progress=False))
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
    raw = byte_level_tokenizer(QWEN_SPECIALS, merges_from=[INSTRUCTION, "You are a helpful assistant.", "system", "user", "assistant"] * 3)
    if action_tokens:
        raw.add_tokens([AddedToken(f"<robot_action_{i}>", normalized=False) for i in range(ACTION_TOKENS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=32768, chat_template=CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder)
    ids = {s: raw.token_to_id(s) for s in QWEN_SPECIALS}
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="Qwen2VLImageProcessor", patch_size=14, temporal_patch_size=2, merge_size=2, min_pixels=3136, max_pixels=1003520,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711]), indent=2))
    width, layers = text
    half = width // 8 // 2                                          # 8 heads; the three rope sections add up to half a head
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=raw.get_vocab_size(), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
                         max_position_embeddings=4096, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]),
                         tie_word_embeddings=True, initializer_range=init, bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"]),
        vision_config=dict(depth=vision[1], hidden_size=vision[0], intermediate_size=2 * vision[0], num_heads=4, out_hidden_size=width, initializer_range=init,
                           fullatt_block_indexes=list(range(1, vision[1])), window_size=112),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


SMOLVLM_SPECIALS = ["<pad>", "<unk>", "<bos>", "<eos>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]


def write_smolvlm2(folder, seed=0, text=(96, 4), vision=(96, 2), image_size=64, patch=16, shuffle=1, init=0.06):
    """A tiny random SmolVLM2 directory that AutoConfig, AutoTokenizer and from_pretrained open like the real one.

    `text`, `vision` = (width, layers); a picture of image_size pixels becomes (image_size / patch / shuffle)^2 tokens.
    """
    import torch
    from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = byte_level_tokenizer(SMOLVLM_SPECIALS, merges_from=[INSTRUCTION + "\n", "Insert needle into eye trocar in simulation\n"] * 3)
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>", model_max_length=8192).save_pretrained(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())     # the class and the named specials that LeRobot's transformers 4 looks for
    about |= dict(tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens=dict(image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>",
                                                                                       end_of_utterance_token="<end_of_utterance>"))
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
    ids = {s: raw.token_to_id(s) for s in SMOLVLM_SPECIALS}
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="SmolVLMImageProcessor", processor_class="SmolVLMProcessor", do_convert_rgb=True, do_image_splitting=True, do_normalize=True, do_pad=True, do_rescale=True, do_resize=True,
        image_mean=[0.5] * 3, image_std=[0.5] * 3, max_image_size=dict(longest_edge=image_size), size=dict(longest_edge=image_size), resample=1, rescale_factor=1 / 255), indent=2))
    (folder / "processor_config.json").write_text(json.dumps(dict(processor_class="SmolVLMProcessor", image_seq_len=(image_size // patch // shuffle) ** 2), indent=2))
    config = SmolVLMConfig(
        text_config=dict(model_type="llama", hidden_size=text[0], intermediate_size=2 * text[0], num_hidden_layers=text[1], num_attention_heads=6, num_key_value_heads=2, head_dim=text[0] // 6 // 2 * 2,
                         vocab_size=raw.get_vocab_size(), rms_norm_eps=1e-5, initializer_range=init, pad_token_id=ids["<pad>"], bos_token_id=ids["<bos>"], eos_token_id=ids["<eos>"], tie_word_embeddings=False),
        vision_config=dict(hidden_size=vision[0], intermediate_size=2 * vision[0], num_hidden_layers=vision[1], num_attention_heads=4, image_size=image_size, patch_size=patch, initializer_range=init),
        scale_factor=shuffle, image_token_id=ids["<image>"], pad_token_id=ids["<pad>"], tie_word_embeddings=False)
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
    chunks = knots[:, low] + (at - low)[None, :, None] * (knots[:, low + 1] - knots[:, low])      # (800, H, A)
    k, n = np.mgrid[:horizon, :horizon]
    dct = np.sqrt(np.where(k == 0, 1, 2) / horizon) * np.cos(np.pi * (n + 0.5) * k / horizon)
    q = np.rint(dct @ chunks * scale).astype(int)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = [chr(i) for i in range(q.max() - q.min() + 1)]
    bpe.train_from_iterator(["".join(map(chr, c.ravel() - q.min())) for c in q],
                            trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=[], initial_alphabet=alphabet, max_token_length=10000, show_progress=False))
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "processor_config.json").write_text(json.dumps(dict(
        action_dim=None, auto_map={"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"}, min_token=int(q.min()), processor_class="UniversalActionProcessor",
        scale=scale, time_horizon=None, vocab_size=bpe.get_vocab_size()), indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False), indent=2))
    return folder


# ---- robot sessions: CSV, npz and images, as guide 5's recorders write them ----------------------------------------------
# The phantom stands on a turntable: the tip chases a trocar that goes round, and follows tissue that breathes. Where the trocar is can be seen: the
# tool camera looks at a mat, fixed to the trocar, whose red rises to the right and blue to the bottom. Where the tissue is in its cycle can only be
# felt: force and the A-scan's peak follow it. Recordings without a sensor are of a stiff phantom, so they have nothing to feel.

SESSION_INSTRUCTION = "Insert the needle into the target point"
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
        here = here + 2.5 * (trocar[i] - here) / 100                            # per second 2.5 times the way that is left
    offset, xy = xy - trocar, xy + [80.0, 118.0]
    z = 245 + (TISSUE_MM * np.sin(2 * np.pi * hz * t + start) if breathes else 0 * t)
    tilt = np.stack([-150 + 0.3 * (xy[:, 1] - 118), 43 - 0.3 * (xy[:, 0] - 80), 179 + 0.3 * (xy[:, 0] - 80)], axis=1)   # the last one crosses 180
    return dict(t=t, pose=np.concatenate([xy, z[:, None], (tilt + 180) % 360 - 180], axis=1), offset=offset, phase=lambda s: 2 * np.pi * hz * s + start)


def session_sensor(run, stamps, rng):
    """Seconds (n,) -> force (n,) float32 and A-scan (n, 1025) float32 with a peak at the tissue."""
    height = np.sin(run["phase"](stamps))
    bins = np.arange(1025)
    ascan = 45 + 60 * np.exp(-((bins - 500 - 120 * height[:, None]) / 25) ** 2) + rng.integers(0, 4, (len(stamps), 1025))
    return (1 + 0.8 * height + rng.normal(0, 0.03, len(stamps))).astype(np.float32), np.rint(ascan).astype(np.float32)


def render_session(offset, view, size, rng):
    """-> (H, W, 3) uint8. View1: tool camera, 12 mm wide, over the tip. View5: the whole table, grey, with trocar and tip."""
    height, width = size
    scale = width / (12 if view == "View1" else 80)                             # pixels per mm
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    x, y = (xs - width / 2) / scale + offset[0], (ys - height / 2) / scale + offset[1]   # mm from the trocar
    if view == "View1":
        mat = np.stack([0.5 + 0.025 * x, np.full_like(x, 0.4), 0.5 + 0.025 * y], axis=-1)
    else:
        mat = np.full((height, width, 3), 0.5, np.float32)
        x, y = (xs - width / 2) / scale, (ys - height / 2) / scale
        mat[(x - offset[0]) ** 2 + (y - offset[1]) ** 2 < 9] = (1.0, 0.9, 0.1)           # the tip
    mat[x**2 + y**2 < 4] = (0.1, 0.8, 0.9)                                      # the trocar
    return np.clip(mat * 255 + rng.normal(0, 4, mat.shape), 0, 255).astype(np.uint8)


def write_session(folder, layout, seed=0, seconds=6.0, sensor=True, size=(72, 128), image_hz=5.0, start=1761551500.0):
    """One recording in `folder` (its name is the recording's) in layout "old", "new" or "legacy". Clock: `start`, epoch seconds."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    run = simulate_session(rng, seconds, breathes=sensor)
    t, pose, stamp = run["t"], run["pose"], "20251027_" + f"{int(start) % 86400 // 3600:02d}{int(start) % 3600 // 60:02d}{int(start) % 60:02d}"
    origin = start + np.rint(np.floor(t / 0.005) * 0.005 * 1000) / 1000
    received = origin + 0.0004 + 0.002 * rng.random(len(t))
    joints = np.degrees(joint_angles(np.concatenate([pose[:, :3], np.radians(pose[:, 3:])], axis=1)))
    if layout == "legacy":
        header, name = "timestamp,joint_angle_1,joint_angle_2,joint_angle_3,joint_angle_4,joint_angle_5,joint_angle_6,EE_x,EE_y,EE_z,EE_a,EE_b,EE_r", f"robot_rt_{stamp}.csv"
        table = np.column_stack([origin, joints, pose])
    else:
        header, name = CSV_COLUMNS.format(force="force" if layout == "new" else "force_placeholder"), "robot_states.csv" if layout == "new" else f"robot_state_{stamp}.csv"
        table = np.column_stack([received, origin, origin + 0.0003, 0 * t, joints, pose])
    np.savetxt(folder / name, table, "%.17g", ",", header=header, comments="")
    if sensor:
        first = 0.02
        rows = first + np.arange(int((seconds - first) * 650)) / 650
        force, ascan = session_sensor(run, rows, rng)
        if layout == "new":                                                     # a window of the newest 650 rows every 200 ms of the saver's clock
            ends, end = [], 649
            while end < len(rows):
                ends.append(end)
                end += int(rng.integers(126, 135))
            data = np.stack([np.column_stack([force[e - 649:e + 1], ascan[e - 649:e + 1]]) for e in ends])
            np.savez_compressed(folder / "sensor_data.npz", timestamps=start + rows[ends], data=data)
        else:
            np.savez(folder / f"sensor_data_{stamp}_{int(start)}.npz", timestamps=start + rows, send_timestamps=start + rows + 0.001, forces=force, alines=ascan)
    for view in ("View1", "View5"):
        place = {"old": f"{view}/left" if view == "View1" else view, "new": f"images/{view}", "legacy": "view1/left" if view == "View1" else "view5_oak"}[layout]
        (folder / place).mkdir(parents=True, exist_ok=True)
        for n in range(int(seconds * image_hz)):
            taken = n / image_hz + 0.01 * rng.random()
            shown = f"{start + taken:.6f}" if layout == "new" else f"{'zed_41182735_left' if view == 'View1' else 'oak_1844301'}_{start + taken:.3f}"
            picture = render_session(run["offset"][min(int(taken * 100), len(t) - 1)], view, size, rng)
            (folder / place / f"{shown}.jpg").write_bytes(jpeg(picture, 90))
    if layout == "new":
        (folder / "metadata.json").write_text(json.dumps(dict(episode_name=folder.name, start_time=start, end_time=start + seconds, camera_views=["View5", "View1"], sensor_hz=650, robot_hz=100,
                                                              sensor_window_size=650, action_horizon=8, action_dim=7), indent=2))
    return folder


def write_sessions(folder, seed=0, white=16, needle=5, new=10, oct=4, seconds=6.0, size=(72, 128)):
    """Data sets of all layouts below `folder`: `white` and `new` recordings with sensor, `needle` and `oct` without. 2.7 MB per second and sensor."""
    folder, i = Path(folder), 0
    plans = [("White_silicone_white_circle/recv_all_{}", "old", True, 4.0)] * white + [("Needle_insertion_eye_trocar/recv_all_{}", "old", False, 4.0)] * needle
    plans += [(f"Make_dataset/New_dataset/{('Blue_point', 'Eye_trocar')[n % 2]}/episode_{{}}", "new", True, 5.0) for n in range(new)] + [("OCT_insertion/Captures{}", "legacy", False, 4.0)] * oct
    for i, (name, layout, sensor, hz) in enumerate(tqdm(plans, desc="sessions", unit="recording", disable=None)):
        clock = 1761551500 + 60 * i
        when = f"20251027_{clock % 86400 // 3600:02d}{clock % 3600 // 60:02d}{clock % 60:02d}"
        write_session(folder / name.format(i + 1 if layout == "legacy" else when), layout, seed * 10007 + i, seconds, sensor, size, hz, float(clock))
    return folder


# ---- what can be made: name -> function(folder, args). A new format is one function and one line here ------------------

PARTS = {
    "insertion": lambda folder, args: write_insertion(folder / "insertion", args.episodes, args.seed),
    "qwen2_5_vl": lambda folder, args: write_qwen2_5_vl(folder / "qwen2_5_vl", args.seed),
    "insertion_sim": lambda folder, args: write_insertion_sim(folder / "insertion_sim", args.episodes, args.seed),
    "smolvlm2": lambda folder, args: write_smolvlm2(folder / "smolvlm2", args.seed),
    "fast": lambda folder, args: write_fast(folder / "fast", args.seed),
    "sessions": lambda folder, args: write_sessions(folder / "sessions", args.seed),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to write: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", default="demo", help="folder to write into (default: demo)")
    parser.add_argument("--episodes", type=int, default=200, help="insertion episodes (default: 200)")
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
