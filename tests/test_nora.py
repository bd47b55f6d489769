"""train_nora.py: the ten truths of DESIGN section 5, on tiny real-format backbones, through its command line where a user would use it."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

import make_demo
import train_nora as nora
from common import checkpoint as ckpt
from common import episodes as ep
from common.config import parse_config
from common.runlog import read_metrics
from common.sampler import GlobalOrder, RankBatches

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def base(insertion_root, qwen_dir):
    """Flags of a run of a second: 4 training frames per step, every log on, no warm-up."""
    return [
        "--dataset.root_dir",
        insertion_root,
        "--model",
        qwen_dir,
        "--fast",
        "fit",
        "--fast_vocab_size",
        300,
        "--horizon",
        3,
        "--use_ee_pose_delta_as_action",
        "--num_val_episodes",
        1,
        "--cameras",
        "camera1",
        "camera3",
        "--resize_resolution",
        56,
        56,
        "--batch_size",
        4,
        "--gradient_accumulation_steps",
        1,
        "--lr",
        1e-3,
        "--num_warmup_steps",
        0,
        "--num_workers",
        0,
        "--logging_frequency",
        1,
        "--val_frequency",
        1000,
        "--checkpoint_save_frequency",
        1000,
        "--val_samples",
        8,
        "--val_decode_samples",
        2,
    ]


def config(flags, *more):
    return parse_config(nora.Config, [str(f) for f in [*flags, *more]], nora.ALIASES)


def run(flags, *more):
    """Train in this process -> metrics."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # accelerate remembers the precision of the first run of a process
    cfg = config(flags, *more)
    nora.main(cfg)
    return read_metrics(cfg.output_dir)


def command(flags, *more, processes=1):
    head = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    )
    return [*head, str(ROOT / "train_nora.py"), *map(str, flags), *map(str, more)]


def shell(flags, *more, processes=1, ok=True):
    result = subprocess.run(
        command(flags, *more, processes=processes),
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (result.returncode == 0) == ok, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout + result.stderr


def losses(rows):
    return [(r["step"], r["train_loss"]) for r in rows if "train_loss" in r]


def state(folder):
    return ckpt.load_state(Path(folder) / "state.pt")["trained"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def parts(base):
    """(cfg, data, fast, prompt, collate, dataset, core model) of the base run."""
    cfg = config(base)
    data = nora.load_data(cfg)
    fast = nora.FastTokenizer.fit(nora.sample_chunks(data, 1000), cfg.fast_scale, cfg.fast_vocab_size)
    prompt, _ = nora.make_prompt(cfg.model, data.spec)
    torch.manual_seed(0)
    core, _ = nora.build_model(cfg, cfg.model, prompt, torch.device("cpu"), torch.float32, "sdpa")
    return dict(
        cfg=cfg,
        data=data,
        fast=fast,
        prompt=prompt,
        collate=nora.Collate(prompt, fast, data.normalizer),
        dataset=nora.NoraDataset(data.train, data),
        core=core,
    )


def items_of(parts, indices):
    return [parts["dataset"][(0, i)] for i in indices]


# ---- data ------------------------------------------------------------------------------------------------------------


def test_every_recording_variant_gives_one_sample(tmp_path, qwen_dir):
    """raw, gzip and JPEG; mm/m; rad/deg; with and without the optional arrays: the same scene gives the same sample."""
    variants = [
        dict(layout="raw"),
        dict(layout="gzip", phase=False, instruction=False, timestamp=False),
        dict(layout="raw", position_unit="m", rotation_unit="deg"),
        dict(layout="jpeg"),
    ]
    samples = []
    for i, v in enumerate(variants):
        make_demo.write_insertion(tmp_path / str(i), episodes=2, size=(60, 80), max_frames=12, **v)
        cfg = config(
            [
                "--dataset.root_dir",
                tmp_path / str(i),
                "--horizon",
                4,
                "--use_ee_pose_delta_as_action",
                "--resize_resolution",
                56,
                84,
                "--cameras",
                "camera1",
                "top_camera",
            ]
        )
        data = nora.load_data(cfg)
        item = nora.NoraDataset(data.train, data)[(0, 5)]
        samples.append((item, data.normalizer.normalize(item["action"]), data))
    first = samples[0]
    assert (
        first[0]["images"].shape == (2, 56, 84, 3)
        and first[0]["images"].dtype == np.uint8
        and first[0]["action"].shape == (4, 6)
        and first[0]["action"].dtype == np.float32
    )
    for (item, normalised, data), v in zip(samples, variants):
        np.testing.assert_allclose(normalised, first[1], atol=2e-4)
        difference = np.abs(item["images"].astype(int) - first[0]["images"])
        assert difference.mean() < 6 if v["layout"] == "jpeg" else difference.max() == 0
        assert item["frame"] == 5 and item["phase"] == (1 if v.get("phase", True) else -1)
        assert item["instruction"] == (
            make_demo.INSTRUCTION if v.get("instruction", True) else cfg.dataset.task_instruction
        )
    assert samples[2][2].spec.position_unit == "m" and samples[2][2].spec.action_definition["rotation_unit"] == "deg"
    np.testing.assert_allclose(samples[2][0]["action"][:, :3], first[0]["action"][:, :3] / 1000, atol=1e-6)


def test_the_target_is_the_motion_that_follows(parts):
    e = parts["data"].train[0]
    item = parts["dataset"][(0, 2)]
    np.testing.assert_allclose(item["action"], np.diff(e.ee_pose[2:6], axis=0), atol=1e-6)


def test_every_frame_with_a_next_one_is_an_observation(parts):
    """Tail chunks are completed by standing still and masked; the public code never shows the last H-1 frames."""
    e, dataset = parts["data"].train[0], parts["dataset"]
    assert len(dataset) == sum(x.num_frames - 1 for x in parts["data"].train)
    last = dataset[(0, e.num_frames - 2)]
    assert (
        last["is_pad"].tolist() == [False, True, True]
        and np.all(last["action"][1:] == 0)
        and last["frame"] == e.num_frames - 2
    )


def test_changing_data_after_t_changes_nothing_seen_at_t(tmp_path, base, parts):
    paths = make_demo.write_insertion(tmp_path, episodes=4, size=(60, 80), max_frames=14)
    with h5py.File(paths[0], "r+") as f:
        f["observations/ee_pose"][6:] += 1
        f["observations/qpos"][6:] += 1
        for camera in f["observations/images"]:
            for t in range(6, 14):
                f[f"observations/images/{camera}"][t] = np.frombuffer(
                    make_demo.jpeg(np.zeros((60, 80, 3), np.uint8)), np.uint8
                )
    cfg = config(base, "--dataset.root_dir", tmp_path, "--state_in_prompt", "--use_qpos")
    data = nora.load_data(cfg, stats=nora.load_data(config(base, "--state_in_prompt", "--use_qpos")).stats)
    other = nora.NoraDataset(nora.load_data(config(base, "--state_in_prompt", "--use_qpos")).train, data)
    changed = nora.NoraDataset(data.train, data)
    for t in range(6):
        a, b = other[(0, t)], changed[(0, t)]
        np.testing.assert_array_equal(a["images"], b["images"])
        np.testing.assert_array_equal(a["state"], b["state"])
        if t + 3 < 6:
            np.testing.assert_array_equal(a["action"], b["action"])


def test_validation_episodes_enter_neither_training_nor_statistics(tmp_path, base):
    paths = make_demo.write_insertion(tmp_path, episodes=4, size=(60, 80), max_frames=14)
    before = nora.load_data(config(base, "--dataset.root_dir", tmp_path))
    with h5py.File(paths[-1], "r+") as f:
        f["observations/ee_pose"][5] += 0.5
    after = nora.load_data(config(base, "--dataset.root_dir", tmp_path))
    assert (
        after.stats == before.stats
        and [e.name for e in after.validation] == [paths[-1].name]
        and paths[-1].name not in [e.name for e in after.train]
    )
    assert after.stats["excluded_episodes"] == [paths[-1].name]


def test_augmentation_and_dropout_are_functions_of_seed_and_position(base, parts):
    cfg = config(
        base,
        "--augment",
        "--camera_dropout_prob",
        1.0,
        "--cameras",
        "camera1",
        "camera2",
        "camera3",
        "--min_cameras",
        2,
    )
    data = nora.load_data(cfg)
    make = lambda: nora.NoraDataset(data.train, data, cfg.dataset, cfg.seed)  # noqa: E731
    a, b = make(), make()
    plain = nora.NoraDataset(data.train, data)
    blank = []
    for p in range(60):
        x = a[(p, 3)]["images"]
        np.testing.assert_array_equal(x, b[(p, 3)]["images"])
        blank.append([bool((view == 0).all()) for view in x])
    blank = np.array(blank)
    assert blank.sum(1).max() == 1 and blank.sum(1).min() == 0 and blank.any(0).all(), (
        "two of three views always stay, and each one is dropped at times"
    )
    assert not np.array_equal(a[(0, 3)]["images"], a[(1, 3)]["images"]) and np.array_equal(
        plain[(0, 3)]["images"], plain[(1, 3)]["images"]
    )


def test_the_only_camera_is_never_blanked(base):
    cfg = config(base, "--camera_dropout_prob", 1.0, "--cameras", "camera1")
    data = nora.load_data(cfg)
    dataset = nora.NoraDataset(data.train, data, cfg.dataset, cfg.seed)
    assert all(dataset[(p, 3)]["images"].any() for p in range(30))


def test_augmentation_off_is_the_identity_and_each_knob_acts():
    image = np.random.default_rng(0).integers(60, 180, (28, 28, 3), dtype=np.uint8)
    off = dataclasses.replace(
        nora.DatasetConfig(),
        augment_brightness=0,
        augment_contrast=0,
        augment_saturation=0,
        augment_hue=0,
        augment_noise=0,
    )
    quiet = nora.augment_image(image, off, np.random.default_rng(0)).astype(int)
    assert np.abs(quiet - image).mean() < 1.5, "only the HSV round trip remains"
    for knob, value in (
        ("augment_brightness", 0.3),
        ("augment_contrast", 0.5),
        ("augment_saturation", 0.5),
        ("augment_hue", 0.3),
        ("augment_noise", 0.1),
    ):
        loud = [
            nora.augment_image(image, dataclasses.replace(off, **{knob: value}), np.random.default_rng(seed)).astype(
                int
            )
            for seed in range(4)
        ]
        assert np.abs(np.stack(loud) - quiet).mean() > 2, knob


# ---- prompt, images and model against transformers ---------------------------------------------------------------------


def official_processor(folder):
    """transformers' own image processor; AutoImageProcessor cannot be imported without torchvision before 5.20 or so."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(folder)


def test_patches_equal_the_image_processor(qwen_dir):
    from common.qwen_vl import image_patches

    processor = official_processor(qwen_dir)
    images = np.random.default_rng(0).integers(0, 256, (3, 84, 56, 3), dtype=np.uint8)
    theirs = processor(images=[nora.Image.fromarray(i) for i in images], return_tensors="pt")
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (processor.image_mean, processor.image_std))
    ours = image_patches(torch.from_numpy(images), mean, std)
    torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-5, rtol=1e-5)
    assert theirs["image_grid_thw"].tolist() == [[1, 6, 4]] * 3


def official_inputs(parts, item, answer):
    """One row made the way transformers documents it: processor output, mm_token_type_ids, labels."""
    prompt, processor = parts["prompt"], official_processor(parts["cfg"].model)
    pixels = processor(images=[nora.Image.fromarray(i) for i in item["images"]], return_tensors="pt")
    text = prompt.tokenizer.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}] * len(item["images"]) + [{"type": "text", "text": item["instruction"]}],
            }
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    for grid in pixels["image_grid_thw"]:
        text = text.replace("<|image_pad|>", "<X>" * int(grid.prod() // 4), 1)
    ids = torch.tensor([prompt.tokenizer(text.replace("<X>", "<|image_pad|>"))["input_ids"] + answer])
    labels = ids.clone()
    labels[:, : -len(answer)] = -100
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == prompt.image_token_id).int(),
        pixel_values=pixels["pixel_values"],
        image_grid_thw=pixels["image_grid_thw"],
        labels=labels,
    )


def test_loss_equals_transformers_own_loss(parts):
    """Right padding without a mask, hand-made rope positions, batched window attention and logits at label places only: still the model's own loss."""
    items = items_of(parts, [0, 5, 9])
    items[1]["instruction"] = "put the tip on the rim and wait there"
    batch = parts["collate"](items)
    with torch.no_grad():
        ours = parts["core"].compute_loss(batch)["sample_loss"]
        for item, loss in zip(items, ours):
            answer = parts["collate"].answer(item["action"])
            theirs = parts["core"].vlm(**official_inputs(parts, item, answer)).loss * len(answer)
            assert loss.item() == pytest.approx(theirs.item(), rel=2e-5)


def test_batched_windows_equal_the_loop(parts):
    """112 x 140 pixels have window sizes that differ, 112 x 112 equal ones; both must equal transformers' loop."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention as attention

    tower, batched = parts["core"].vlm.model.visual, attention.forward
    for h, w in ((112, 112), (224, 112), (112, 140)):
        patches, grid = torch.randn(2 * h * w // 196, 1176), torch.tensor([[1, h // 14, w // 14]] * 2)
        with torch.no_grad():
            fast = tower(patches, grid).pooler_output
            attention.forward = attention.looped_forward
            try:
                slow = tower(patches, grid).pooler_output
            finally:
                attention.forward = batched
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_loss_covers_action_tokens_and_the_end_only(parts):
    items = items_of(parts, [0, 7])
    batch, prompt = parts["collate"](items), parts["prompt"]
    for b, item in enumerate(items):
        labels = batch["targets"][batch["target_sample"] == b].tolist()
        assert labels == [
            prompt.first_action + i for i in parts["fast"].encode(parts["data"].normalizer.normalize(item["action"]))
        ] + [prompt.end]
        rows = batch["target_rows"][batch["target_sample"] == b]
        assert batch["input_ids"].flatten()[rows + 1].tolist() == labels, "each place predicts the token behind it"


def test_padding_and_batch_composition_change_no_loss(parts):
    items = items_of(parts, [0, 5])
    items[1]["instruction"] = "a much longer instruction that makes the other row pad " * 3
    with torch.no_grad():
        together = parts["core"].compute_loss(parts["collate"](items))["sample_loss"]
        alone = torch.cat([parts["core"].compute_loss(parts["collate"]([i]))["sample_loss"] for i in items])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def observation(item, **more):
    return dict(
        images={"camera1": item["images"][0], "camera3": item["images"][1]}, instruction=item["instruction"], **more
    )


def policy_of(parts):
    return nora.Policy(parts["core"], parts["fast"], parts["data"].spec, parts["data"].stats)


def test_prediction_does_not_depend_on_the_batch_and_listens_to_image_and_text(parts):
    policy, items = policy_of(parts), items_of(parts, [0, 20, 30])
    items[2]["instruction"] = "retract " * 20
    together = policy.predict([observation(i) for i in items])
    assert together.shape == (3, 3, 6) and together.dtype == np.float32
    for row, item in zip(together, items):
        np.testing.assert_array_equal(policy.predict([observation(item)])[0], row)
    with torch.no_grad():

        def score(item):
            return parts["core"].compute_loss(parts["collate"]([item]))["loss_sum"].item()

        assert score(items[0]) != score({**items[0], "instruction": "retract"}) and score(items[0]) != score(
            {**items[0], "images": items[1]["images"]}
        )


def test_the_policy_resizes_as_the_training_does(tmp_path, insertion_root, parts):
    """predict gets camera-sized pictures, training reads JPEGs at a smaller DCT scale: open_episodes goes the training's way, bit for bit."""
    policy = policy_of(parts)
    episode = next(iter(policy.open_episodes(insertion_root)))
    item = parts["dataset"][(0, 4)]
    seen = episode["sample"](4)
    for k, camera in enumerate(("camera1", "camera3")):
        np.testing.assert_array_equal(nora.resize_image(seen["images"][camera], [56, 56]), item["images"][k])
    np.testing.assert_array_equal(episode["target"][4:7], item["action"])
    with pytest.raises(ValueError, match="camera1.*needs"):
        policy.predict([dict(images={"camera1": item["images"][0]})])


def test_decoding_cannot_leave_the_format(parts):
    """Random weights want to say anything; the answer still has exactly H*A coefficients, and what was forced is reported."""
    policy, items = policy_of(parts), items_of(parts, range(8))
    prompts = [parts["prompt"].ids(i["instruction"]) for i in items]
    batch = parts["prompt"].batch(prompts) | {"images": torch.from_numpy(np.stack([i["images"] for i in items]))}
    ids, malformed = parts["core"].generate(batch, parts["fast"], 18)
    assert all(parts["fast"].decode(row, 3, 6)[1] == "ok" for row in ids) and malformed.any()
    again, _ = parts["core"].generate(batch, parts["fast"], 18, fixed_steps=True)
    assert ids == again


def test_greedy_decoding_equals_the_argmax_of_a_full_forward(parts):
    """The cached, left-padded loop against a plain forward pass over prompt + answer, token by token."""
    item, fast, prompt, core = items_of(parts, [3])[0], parts["fast"], parts["prompt"], parts["core"]
    batch = prompt.batch([prompt.ids(item["instruction"])]) | {"images": torch.from_numpy(item["images"][None])}
    ids, _ = core.generate(batch, fast, 18)
    answer = [prompt.first_action + i for i in ids[0]] + [prompt.end]
    with torch.no_grad():
        logits = core.vlm(**official_inputs(parts, item, answer)).logits[0, -len(answer) - 1 : -1]
    remaining, open_ = 18, 0
    for row, token in zip(logits, answer):
        allowed = (
            [
                i
                for i in range(fast.vocab_size)
                if fast.valid[i] and fast.lead[i] == open_ and fast.starts[i] <= remaining
            ]
            if (remaining or open_)
            else []
        )
        if token == prompt.end:
            assert not allowed
            break
        best = max(allowed, key=lambda i: row[prompt.first_action + i].item())
        assert token == prompt.first_action + best
        remaining, open_ = remaining - fast.starts[best], fast.tail[best]


# ---- optimisation ----------------------------------------------------------------------------------------------------


def test_micro_batches_equal_one_batch(tmp_path, base):
    """2 micro-batches of 4 and one of 8: the same losses and the same weights, rows of different length included."""
    a = run(base, "--output_dir", tmp_path / "a", "--max_steps", 3, "--batch_size", 8)
    b = run(base, "--output_dir", tmp_path / "b", "--max_steps", 3, "--gradient_accumulation_steps", 2)
    np.testing.assert_allclose([l for _, l in losses(a)], [l for _, l in losses(b)], rtol=2e-5)
    for (k, x), y in zip(state(tmp_path / "a/steps_3").items(), state(tmp_path / "b/steps_3").values()):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-4, msg=k)


def test_the_learning_rate_is_a_function_of_the_step():
    cfg = dataclasses.replace(nora.Config(), learning_rate=1.0, num_warmup_steps=4, max_train_steps=12)
    assert [nora.lr_at(s, cfg) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert (
        nora.lr_at(4, cfg) == 1.0
        and nora.lr_at(8, cfg) == pytest.approx(0.5)
        and nora.lr_at(12, cfg) == 0
        and nora.lr_at(500, cfg) == 0
    )
    assert all(nora.lr_at(s, cfg) >= nora.lr_at(s + 1, cfg) for s in range(4, 40))


def test_the_logged_learning_rate_ignores_accumulation(tmp_path, base):
    rows = run(
        base,
        "--output_dir",
        tmp_path,
        "--max_steps",
        3,
        "--gradient_accumulation_steps",
        2,
        "--batch_size",
        2,
        "--num_warmup_steps",
        2,
    )
    cfg = config(base, "--max_steps", 3, "--num_warmup_steps", 2)
    assert [r["learning_rate"] for r in rows if "learning_rate" in r] == [nora.lr_at(s, cfg) for s in range(3)]


def test_one_batch_can_be_learned(tmp_path, base, insertion_root):
    rows = run(
        base,
        "--output_dir",
        tmp_path,
        "--max_steps",
        60,
        "--num_val_episodes",
        3,
        "--lr",
        3e-3,
        "--logging_frequency",
        10,
        "--batch_size",
        13,
    )
    first, last = losses(rows)[0][1], losses(rows)[-1][1]
    assert last < 0.35 * first and rows[-1].get("val_loss") is not None


def test_the_checkpoint_holds_the_weights_after_the_step_and_predicts_the_same(tmp_path, base, parts, monkeypatch):
    """steps_2 equals two optimizer steps made by hand, and load_policy(steps_2) predicts what the trained model predicts."""
    kept = {}
    original = nora.save_model
    monkeypatch.setattr(
        nora,
        "save_model",
        lambda folder, model, *rest, **more: (kept.update(model=model), original(folder, model, *rest, **more)),
    )
    run(base, "--output_dir", tmp_path, "--max_steps", 2, "--gradient_clipping", "null")
    cfg, core = (
        config(base, "--max_steps", 2),
        nora.build_model(parts["cfg"], parts["cfg"].model, parts["prompt"], torch.device("cpu"), torch.float32, "sdpa")[
            0
        ],
    )
    optimizer = torch.optim.AdamW(core.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-8)
    for step, keys in enumerate(RankBatches(GlobalOrder(len(parts["dataset"]), cfg.seed), 4, steps=2)):
        batch = parts["collate"]([parts["dataset"][k] for k in keys])
        optimizer.param_groups[0]["lr"] = nora.lr_at(step, cfg)
        (core(batch)["loss_sum"] / len(batch["targets"])).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in core.named_parameters():
        torch.testing.assert_close(state(tmp_path / "steps_2")[name], value.detach(), rtol=1e-5, atol=1e-6)
    items = items_of(parts, [0, 9, 17])
    trained = nora.Policy(kept["model"], parts["fast"], parts["data"].spec, parts["data"].stats)
    for path in (tmp_path, tmp_path / "steps_2", tmp_path / "steps_2" / "model"):
        np.testing.assert_array_equal(
            nora.load_policy(path, "cpu").predict([observation(i) for i in items]),
            trained.predict([observation(i) for i in items]),
        )


def test_transformers_opens_the_exported_model(tmp_path, base):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    run(base, "--output_dir", tmp_path, "--max_steps", 1)
    folder = tmp_path / "steps_1" / "model"
    vlm, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert (
        not info["missing_keys"]
        and not info["unexpected_keys"]
        and vlm.lm_head.weight.data_ptr() == vlm.get_input_embeddings().weight.data_ptr()
    )
    assert torch.equal(vlm.lm_head.weight, state(tmp_path / "steps_1")["vlm.model.language_model.embed_tokens.weight"])
    assert (
        AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<robot_action_2047>")
        and official_processor(folder).patch_size == 14
    )
    assert {
        "dataset_stats.json",
        "policy.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "fast",
    } <= {p.name for p in folder.iterdir()}


# ---- stop and resume -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, base):
    """5 steps of 2 x 4 samples over 39 samples: the stops below fall into the middle of an epoch, and step 5 crosses into the second."""
    flags = [*base, "--max_steps", 6, "--gradient_accumulation_steps", 2, "--augment", "--val_frequency", 2]
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    rows = run(flags, "--output_dir", out)
    return flags, rows, state(out / "steps_6")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_resume_equals_uninterrupted(tmp_path, uninterrupted, stop_at, workers):
    """Bitwise: losses, validation, and every weight. 2 workers read ahead, which must not be lost or repeated."""
    flags, rows, weights = uninterrupted
    out = ["--output_dir", tmp_path, "--num_workers", workers]

    class StopAt(ckpt.StopSignal):
        """A signal that arrives while step `stop_at` runs."""

        calls = 0

        def __init__(self):
            self._previous = {}

        @property
        def received(self):
            StopAt.calls += 1
            return "SIGTERM" if StopAt.calls == stop_at else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ckpt, "StopSignal", StopAt)
        run(flags, *out)
    assert list(ckpt.steps_in(tmp_path)) == [stop_at]
    resumed = run(flags, *out, "--resume", "auto")

    def values(all_rows):
        return [
            {
                k: v
                for k, v in r.items()
                if k in ("step", "train_loss", "token_accuracy", "grad_norm", "learning_rate") or k.startswith("val_")
            }
            for r in all_rows
        ]

    assert values(resumed) == values(rows)
    assert same(state(tmp_path / "steps_6"), weights)


def test_sigterm_finishes_the_step_saves_and_exits_zero(tmp_path, base):
    process = subprocess.Popen(
        command(base, "--output_dir", tmp_path, "--max_steps", 500),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_for(
        lambda: (
            (tmp_path / "metrics.jsonl").exists() and len((tmp_path / "metrics.jsonl").read_text().splitlines()) >= 3
        ),
        process,
    )
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume auto" in output, output[-2000:]
    ((step, folder),) = ckpt.steps_in(tmp_path).items()
    assert f"after step {step}" in output and step == len(losses(read_metrics(tmp_path)))
    assert json.loads((folder / "meta.json").read_text())["step"] == step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_spares_the_loader(tmp_path, base, number):
    """Ctrl-C reaches the loader's workers as well; the step must still get its data and be saved."""
    process = subprocess.Popen(
        command(base, "--output_dir", tmp_path, "--max_steps", 500, "--num_workers", 2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_for(
        lambda: (
            (tmp_path / "metrics.jsonl").exists() and len((tmp_path / "metrics.jsonl").read_text().splitlines()) >= 3
        ),
        process,
    )
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and len(ckpt.steps_in(tmp_path)) == 1, output[-2000:]


def wait_for(condition, process, timeout=120):
    end = time.time() + timeout
    while not condition():
        assert process.poll() is None and time.time() < end, process.communicate()[0][-3000:]
        time.sleep(0.02)


def test_kill_minus_nine_leaves_a_checkpoint_that_resumes(tmp_path, base):
    """Killed at random moments while every step saves; then the run goes on to the same weights as one that was never killed."""
    flags = [*base, "--max_steps", 12, "--checkpoint_save_frequency", 1, "--keep_checkpoints", 2]
    rng = np.random.default_rng(0)
    for attempt in range(3):
        process = subprocess.Popen(
            command(flags, "--output_dir", tmp_path / "killed", "--resume", "auto"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        before = max(ckpt.steps_in(tmp_path / "killed"), default=0)
        wait_for(lambda: max(ckpt.steps_in(tmp_path / "killed"), default=0) >= before + 2, process)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.communicate()
        for path in ckpt.steps_in(tmp_path / "killed").values():
            ckpt.load_state(path / "state.pt"), nora.read_exported(path / "model")
    run(flags, "--output_dir", tmp_path / "killed", "--resume", "auto")
    run(flags, "--output_dir", tmp_path / "whole")
    assert same(state(tmp_path / "killed/steps_12"), state(tmp_path / "whole/steps_12"))
    assert losses(read_metrics(tmp_path / "killed")) == losses(read_metrics(tmp_path / "whole"))
    assert not list((tmp_path / "killed").glob(".tmp-*"))


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, base, monkeypatch, capsys):
    real = ckpt.require_space
    full = []

    def require(folder, size):
        if full:
            raise ckpt.DiskFull(28, "a checkpoint needs 1.00 GB, 0.00 GB are free")
        full.append(True)
        real(folder, size)

    monkeypatch.setattr(ckpt, "require_space", require)
    with pytest.raises(ckpt.DiskFull, match="newest complete one is steps_1"):
        run(base, "--output_dir", tmp_path, "--max_steps", 3, "--checkpoint_save_frequency", 1)
    assert list(ckpt.steps_in(tmp_path)) == [1] and "CHECKPOINT NOT SAVED at step 2" in capsys.readouterr().out
    monkeypatch.undo()
    assert len(losses(run(base, "--output_dir", tmp_path, "--max_steps", 3, "--resume", "auto"))) == 3


def test_rotation_keeps_the_newest_and_the_best(tmp_path, base):
    run(
        base,
        "--output_dir",
        tmp_path,
        "--max_steps",
        5,
        "--checkpoint_save_frequency",
        1,
        "--val_frequency",
        1,
        "--keep_checkpoints",
        2,
        "--lr",
        0.3,
    )
    vals = {r["step"]: r["val_loss"] for r in read_metrics(tmp_path) if "val_loss" in r}
    assert set(ckpt.steps_in(tmp_path)) == {4, 5, min(vals, key=vals.get)}


def test_an_existing_run_is_not_overwritten(tmp_path, base):
    run(base, "--output_dir", tmp_path, "--max_steps", 1)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="--resume auto"):
        run(base, "--output_dir", tmp_path, "--max_steps", 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--horizon", 5], "fingerprint"),
        (["--seed", 1], "seed"),
        (["--train", "head"], "train"),
        (["--num_val_episodes", 2], "fingerprint|data"),
    ],
)
def test_a_resume_that_would_mean_something_else_is_refused(tmp_path, base, flags, message):
    run(base, "--output_dir", tmp_path, "--max_steps", 1)
    with pytest.raises(ValueError, match=message):
        run(base, "--output_dir", tmp_path, "--max_steps", 2, "--resume", "auto", *flags)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_two_processes_equal_one_with_twice_the_batch(tmp_path, base):
    flags = [*base, "--max_steps", 4, "--val_frequency", 2, "--val_samples", 7, "--augment"]
    shell(flags, "--output_dir", tmp_path / "two", processes=2)
    one = run(flags, "--output_dir", tmp_path / "one", "--batch_size", 8)
    two = read_metrics(tmp_path / "two")
    for key in ("train_loss", "val_loss", "token_accuracy", "grad_norm"):
        np.testing.assert_allclose([r[key] for r in two if key in r], [r[key] for r in one if key in r], rtol=1e-4)
    for (k, x), y in zip(state(tmp_path / "one/steps_4").items(), state(tmp_path / "two/steps_4").values()):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=5e-4, msg=k)
    # and two processes go on with what one has left
    shell(flags, "--output_dir", tmp_path / "one", "--max_steps", 5, "--resume", "auto", processes=2)
    assert [s for s, _ in losses(read_metrics(tmp_path / "one"))] == [1, 2, 3, 4, 5]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, base):
    process = subprocess.Popen(
        command(base, "--output_dir", tmp_path, "--max_steps", 500, processes=2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_for(
        lambda: (
            (tmp_path / "metrics.jsonl").exists() and len((tmp_path / "metrics.jsonl").read_text().splitlines()) >= 3
        ),
        process,
    )
    workers = [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and f"\nPPid:\t{process.pid}\n" in (p / "status").read_text()
    ]
    assert len(workers) == 2
    os.kill(max(workers), signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0 and "--resume auto" in output, output[-2000:]
    assert list(ckpt.steps_in(tmp_path)) == [len(losses(read_metrics(tmp_path)))]


def test_fsdp_equals_one_process(tmp_path, base):
    """FSDP2 over 2 gloo processes: losses, the exported model, and a resume."""
    flags = [*base, "--max_steps", 3, "--val_frequency", 2, "--checkpoint_save_frequency", 2]
    shell(flags, "--output_dir", tmp_path / "two", "--fsdp", processes=2)
    one = run(flags, "--output_dir", tmp_path / "one", "--batch_size", 8)
    two = read_metrics(tmp_path / "two")
    np.testing.assert_allclose([l for _, l in losses(two)], [l for _, l in losses(one)], rtol=1e-4)
    np.testing.assert_allclose(
        [r["val_loss"] for r in two if "val_loss" in r], [r["val_loss"] for r in one if "val_loss" in r], rtol=1e-4
    )
    a, b = (nora.load_policy(tmp_path / name, "cpu").model.state_dict() for name in ("one", "two"))
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=5e-4, msg=k)
    import shutil

    shutil.rmtree(tmp_path / "two/steps_3")
    shell(flags, "--output_dir", tmp_path / "two", "--fsdp", "--resume", "auto", processes=2)
    resumed = losses(read_metrics(tmp_path / "two"))
    assert resumed[:2] == losses(two)[:2] and resumed[2][1] == pytest.approx(losses(two)[2][1], rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "head"])
def test_two_processes_equal_one_where_parts_are_frozen(tmp_path, base, kind):
    flags = [*base, "--max_steps", 2, "--train", kind, "--gradient_checkpointing"]
    shell(flags, "--output_dir", tmp_path / "two", processes=2)
    one = run(flags, "--output_dir", tmp_path / "one", "--batch_size", 8)
    np.testing.assert_allclose(
        [l for _, l in losses(read_metrics(tmp_path / "two"))], [l for _, l in losses(one)], rtol=1e-4
    )


# ---- what is trained -------------------------------------------------------------------------------------------------


def changed_names(before, after):
    return {k for k in before if not torch.equal(before[k], after[k])}


def test_lora_trains_the_adapter_and_the_action_rows_and_merges(tmp_path, base, parts, qwen_dir):
    from transformers import Qwen2_5_VLForConditionalGeneration

    flags = [*base, "--train", "lora", "--lora_rank", 4, "--lora_alpha", 8, "--lora_dropout", 0.1]
    run(flags, "--output_dir", tmp_path / "run", "--max_steps", 4)
    step = tmp_path / "run/steps_4"
    kept = state(step)
    assert all("lora_" in k or "trainable_tokens" in k for k in kept) and not any("visual" in k for k in kept)
    assert (step / "model/adapter_config.json").is_file() and not (step / "model/model.safetensors").exists()
    before, after = (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(p).state_dict() for p in (qwen_dir, step / "merged")
    )
    moved = changed_names(before, after)
    assert moved and all("language_model.layers" in k or "embed_tokens" in k or "lm_head" in k for k in moved)
    table = "model.language_model.embed_tokens.weight"
    rows = (before[table] != after[table]).any(1).nonzero().flatten()
    assert (
        rows.min() >= parts["prompt"].first_action
        and len(rows) > 0
        and torch.equal(after[table], after["lm_head.weight"])
    ), "only action rows, still tied"
    items = items_of(parts, [0, 11])
    a, b = (nora.load_policy(p, "cpu").predict([observation(i) for i in items]) for p in (step, step / "merged"))
    np.testing.assert_allclose(a, b, atol=1e-6)
    # a resume mid-way: dropout and weights as if never stopped
    run(flags, "--output_dir", tmp_path / "half", "--max_steps", 4, "--checkpoint_save_frequency", 2)
    import shutil

    shutil.rmtree(tmp_path / "half/steps_4")
    run(flags, "--output_dir", tmp_path / "half", "--max_steps", 4, "--resume", "auto")
    assert same(state(tmp_path / "half/steps_4"), kept)


def test_head_trains_the_embedding_table_only(tmp_path, base):
    run(base, "--output_dir", tmp_path, "--max_steps", 1, "--train", "head")
    assert set(state(tmp_path / "steps_1")) == {"vlm.model.language_model.embed_tokens.weight"}


def test_gradient_checkpointing_changes_no_loss(tmp_path, base):
    a = run(base, "--output_dir", tmp_path / "a", "--max_steps", 2)
    b = run(base, "--output_dir", tmp_path / "b", "--max_steps", 2, "--gradient_checkpointing")
    np.testing.assert_allclose([l for _, l in losses(a)], [l for _, l in losses(b)], rtol=1e-6)


def test_bf16_trains_fp32_masters_and_exports_bf16(tmp_path, base):
    run(base, "--output_dir", tmp_path, "--max_steps", 1, "--mixed-precision", "bf16")
    from safetensors.torch import load_file

    assert {v.dtype for v in state(tmp_path / "steps_1").values()} == {torch.float32}
    assert {v.dtype for v in load_file(tmp_path / "steps_1/model/model.safetensors").values()} == {torch.bfloat16}
    assert (
        len(
            losses(
                run(base, "--output_dir", tmp_path, "--max_steps", 2, "--mixed_precision", "bf16", "--resume", "auto")
            )
        )
        == 2
    )


def test_a_backbone_without_action_tokens_gets_them(tmp_path, base):
    plain = make_demo.write_qwen2_5_vl(tmp_path / "plain", text=(64, 2), vision=(32, 2), action_tokens=False)
    run(base, "--model", plain, "--output_dir", tmp_path / "run", "--max_steps", 1)
    policy = nora.load_policy(tmp_path / "run", "cpu")
    assert policy.model.prompt.tokenizer.convert_tokens_to_ids("<robot_action_0>") == policy.model.prompt.first_action
    assert policy.model.vlm.get_input_embeddings().weight.shape[0] >= policy.model.prompt.first_action + 2048


def test_weights_are_loaded_whole_or_not_at_all(tmp_path, base, parts):
    run(base, "--output_dir", tmp_path / "a", "--max_steps", 2)
    donor = nora.load_policy(tmp_path / "a", "cpu").model.vlm.state_dict()
    torch.save(
        {"model_state_dict": {f"module.{k}": v for k, v in donor.items() if k != "lm_head.weight"}}, tmp_path / "w.pt"
    )
    for path in (tmp_path / "a/steps_2", tmp_path / "a/steps_2/model/model.safetensors", tmp_path / "w.pt"):
        cfg = dataclasses.replace(parts["cfg"], load_model_weights=str(path))
        core, _ = nora.build_model(cfg, cfg.model, parts["prompt"], torch.device("cpu"), torch.float32, "sdpa")
        assert same({k: v for k, v in core.vlm.state_dict().items()}, donor)
    short = dict(list(donor.items())[:-3])
    torch.save(short, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"covers \d+ of \d+ tensors; missing"):
        nora.build_model(
            dataclasses.replace(parts["cfg"], load_model_weights=str(tmp_path / "short.pt")),
            parts["cfg"].model,
            parts["prompt"],
            torch.device("cpu"),
            torch.float32,
            "sdpa",
        )


def test_the_state_in_the_prompt_reaches_the_model(tmp_path, base):
    flags = [*base, "--state_in_prompt", "--use_qpos"]
    run(flags, "--output_dir", tmp_path, "--max_steps", 1)
    policy = nora.load_policy(tmp_path, "cpu")
    data = nora.load_data(config(flags))
    item = nora.NoraDataset(data.train, data)[(0, 3)]
    raw = ep.robot_state(data.train[0], ["qpos", "ee_pose"])[3]
    text = policy.model.prompt.text("go", policy.state_normalizer.normalize(raw))
    assert text.count(" State: ") == 1 and len(text.split(" State: ")[1].split("<|im_end|>")[0].split()) == 12
    np.testing.assert_array_equal(policy.state_normalizer.normalize(raw), item["state"])
    assert policy.predict(
        [dict(images={"camera1": item["images"][0], "camera3": item["images"][1]}, instruction=None, state=raw)]
    ).shape == (1, 3, 6)


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_non_finite_step_changes_no_weight_and_names_the_sample(tmp_path, base, monkeypatch, capsys):
    real, seen = nora.Nora.compute_loss, []

    def poisoned(self, batch):
        out = real(self, batch)
        seen.append(1)
        if len(seen) == 2:
            out["sample_loss"] = out["sample_loss"].index_fill(0, torch.tensor([1]), math.nan)
            out["loss_sum"] = out["loss_sum"] * math.nan
        return out

    monkeypatch.setattr(nora.Nora, "compute_loss", poisoned)
    rows = run(
        base, "--output_dir", tmp_path, "--max_steps", 3, "--checkpoint_save_frequency", 1, "--keep_checkpoints", 0
    )
    assert same(state(tmp_path / "steps_1"), state(tmp_path / "steps_2")) and not same(
        state(tmp_path / "steps_2"), state(tmp_path / "steps_3")
    )
    data = nora.load_data(config(base))
    dataset = nora.NoraDataset(data.train, data)
    e, t = dataset.locate(GlobalOrder(len(dataset), 42).index(5))
    assert [r["nonfinite"] for r in rows if "nonfinite" in r] == [[[data.train[e].name, t]]]
    assert (
        f"NON-FINITE step 2 skipped, weights unchanged: loss of {data.train[e].name} frame {t}"
        in capsys.readouterr().out
    )
    assert rows[-1].get("skipped_steps", 1) == 1


def test_a_skipped_step_costs_the_log_nothing_else(tmp_path, base, monkeypatch):
    """The mean over an interval is over the steps that counted."""
    real, seen = nora.Nora.compute_loss, []

    def poisoned(self, batch):
        seen.append(1)
        out = real(self, batch)
        return out | {"loss_sum": out["loss_sum"] * math.nan} if len(seen) == 3 else out

    clean = run(base, "--output_dir", tmp_path / "clean", "--max_steps", 2)
    monkeypatch.setattr(nora.Nora, "compute_loss", poisoned)
    rows = run(
        base, "--output_dir", tmp_path / "run", "--max_steps", 3, "--logging_frequency", 3, "--num_val_episodes", 1
    )
    ((_, mean),) = losses(rows)
    first, second = (l for _, l in losses(clean))
    assert min(first, second) < mean < max(first, second) and rows[-1].get("skipped_steps", 1) == 1


def test_ten_non_finite_steps_in_a_row_stop_the_run(tmp_path, base, monkeypatch):
    real = nora.Nora.compute_loss
    monkeypatch.setattr(
        nora.Nora,
        "compute_loss",
        lambda self, batch: {k: v * math.inf if k == "loss_sum" else v for k, v in real(self, batch).items()},
    )
    with pytest.raises(FloatingPointError, match="10 steps in a row"):
        run(base, "--output_dir", tmp_path, "--max_steps", 30)


def test_out_of_memory_says_which_key_to_change(tmp_path, base, monkeypatch):
    def full(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(nora.Nora, "compute_loss", full)
    with pytest.raises(
        torch.OutOfMemoryError, match="CUDA out of memory with per_device_batch_size 4.*gradient_checkpointing"
    ):
        run(base, "--output_dir", tmp_path, "--max_steps", 1)


def test_a_killed_worker_is_explained(tmp_path, base, monkeypatch):
    def die(self, key):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(nora.NoraDataset, "__getitem__", die)
    with pytest.raises(RuntimeError, match="DataLoader worker crashed .num_workers is 1.*--num_workers 0"):
        run(base, "--output_dir", tmp_path, "--max_steps", 1, "--num_workers", 1)


@pytest.fixture
def broken_root(tmp_path):
    return make_demo.write_insertion(tmp_path / "data", episodes=4, size=(60, 80), max_frames=14)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_jpeg_is_named_and_stops(tmp_path, base, broken_root, workers):
    for path in broken_root[:3]:
        with h5py.File(path, "r+") as f:
            for t in range(14):
                f["observations/images/side_camera"][t] = np.zeros(1, np.uint8)
    with pytest.raises(ep.BadEpisode, match="side_camera' frame .* is not a decodable JPEG: 1 bytes"):
        run(
            base,
            "--dataset.root_dir",
            tmp_path / "data",
            "--output_dir",
            tmp_path / "run",
            "--max_steps",
            1,
            "--num_workers",
            workers,
        )


def test_a_truncated_file_stops_unless_it_may_be_left_out(tmp_path, base, broken_root, capsys):
    content = broken_root[1].read_bytes()
    broken_root[1].write_bytes(content[: len(content) // 2])
    flags = [*base, "--dataset.root_dir", tmp_path / "data", "--output_dir", tmp_path / "run", "--max_steps", 1]
    with pytest.raises(ep.BadEpisode, match=f"{broken_root[1].name}.*skip_bad_episodes"):
        run(flags)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir()), (
        "nothing is written before the data is good"
    )
    run(flags, "--skip_bad_episodes")
    printed = capsys.readouterr().out
    assert f"excluded  {broken_root[1]}" in printed and "2 training episodes" in printed


@pytest.mark.parametrize(
    "flags, error, message",
    [
        (["--dataset.root_dir", "/nowhere"], FileNotFoundError, "No HDF5 files found.*'/nowhere'"),
        (["--horizon", 0], ValueError, "dataset.horizon is 0"),
        (["--cameras", "camera9"], ValueError, "has 'camera9'.*camera1 = side_camera"),
        (["--min_cameras", 3], ValueError, "min_cameras is 3"),
        (["--resize_resolution", 224, 225], ValueError, "multiples of 28"),
        (["--num_val_episodes", 4], ValueError, "num_val_episodes is 4, but there are 4"),
        (["--model", "/no/model"], FileNotFoundError, "model '/no/model'.*--model DIR"),
        (["--fast", "/no/fast"], FileNotFoundError, "FAST tokenizer '/no/fast'.*--fast fit"),
        (["--fast_vocab_size", 4096], ValueError, "fast_vocab_size is 4096"),
        (["--max_steps", 0], ValueError, "max_train_steps is 0"),
        (["--resume", "/no/checkpoint"], FileNotFoundError, "resume_from_checkpoint '/no/checkpoint'"),
        (["--fsdp"], ValueError, "fsdp needs several processes"),
        (["--fsdp", "--train", "head"], ValueError, "fsdp shards a full training"),
        (["--attn_implementation", "flash_attention_2"], ValueError, "Flash Attention not supported"),
        (["--normalization_stats_path", "missing.yaml"], FileNotFoundError, "missing.yaml not found.*compute_stats.py"),
        (["--merge", "/no/step"], FileNotFoundError, "--merge /no/step"),
    ],
)
def test_what_a_user_can_get_wrong(tmp_path, base, flags, error, message):
    with pytest.raises(error, match=message):
        run(base, "--output_dir", tmp_path / "run", "--max_steps", 1, *flags)


@pytest.mark.parametrize("action, still", [("joints", "qpos"), ("past_delta", None)])
def test_holding_still_means_no_motion_for_every_kind_of_action(tmp_path, parts, action, still):
    """The baseline of evaluate.py: joint targets stay where the joints are, recorded deltas become zero."""
    make_demo.write_insertion(tmp_path, episodes=1, size=(60, 80), max_frames=14, action=action)
    spec = dataclasses.replace(parts["data"].spec, action_definition=dict(source="action", dim=6, rotation_unit="rad"))
    (episode,) = nora.Policy(parts["core"], parts["fast"], spec, parts["data"].stats).open_episodes(tmp_path)
    expected = ep.load_episodes(tmp_path)[0][0].qpos if still else np.zeros((14, 6))
    np.testing.assert_array_equal(episode["hold"], expected)


# ---- check, statistics, command line ---------------------------------------------------------------------------------


def test_check_needs_no_weights_and_shows_a_batch(base, capsys, monkeypatch):
    monkeypatch.setattr(nora, "build_model", None)
    nora.main(config(base, "--check", "--check_images"))
    shown = capsys.readouterr().out
    for part in (
        "3 training episodes",
        "(4, 2, 56, 56, 3)",
        "Insert the needle",
        "<robot_action_",
        "q01",
        "check passed",
        "every image of every camera decodes",
        "tokens per chunk",
    ):
        assert part in shown, shown
    nora.main(config(base, "--check", "--model", "/no/model", "--fast", "/no/fast"))
    assert "not shown: model '/no/model'" in (shown := capsys.readouterr().out) and "check passed" in shown


def test_check_warns_of_a_recorded_action_that_is_yesterdays(base, capsys):
    nora.main(config(base, "--check", "--use_ee_pose_delta_as_action", "false"))
    assert "use_ee_pose_delta_as_action: true" in capsys.readouterr().out


def test_compute_stats_gives_the_numbers_that_training_uses(tmp_path, base):
    import compute_stats

    cfg = tmp_path / "train.yaml"
    nora.save_config(config(base), cfg)
    for suffix in ("yaml", "json"):
        compute_stats.main(
            parse_config(
                compute_stats.Config, ["--config", str(cfg), "--output", str(tmp_path / f"s.{suffix}")], partial=True
            )
        )
    own = nora.load_data(config(base))
    for suffix in ("yaml", "json"):
        shared = nora.load_data(config(base, "--normalization_stats_path", tmp_path / f"s.{suffix}"))
        assert (
            shared.stats["action"] == own.stats["action"]
            and shared.stats["excluded_episodes"] == own.stats["excluded_episodes"]
        )
    with pytest.raises(ValueError, match="computed for actions"):
        nora.load_data(
            config(base, "--use_ee_pose_delta_as_action", "false", "--normalization_stats_path", tmp_path / "s.yaml")
        )
    with pytest.raises(ValueError, match="this run validates on"):
        nora.load_data(config(base, "--num_val_episodes", 2, "--normalization_stats_path", tmp_path / "s.yaml"))


def test_the_run_directory_tells_how_it_was_made(tmp_path, base):
    run(base, "--output_dir", tmp_path, "--max_steps", 1)
    names = {p.name for p in tmp_path.iterdir()}
    assert {
        "config.yaml",
        "train_nora.py",
        "dataset_stats.json",
        "validation_episodes.txt",
        "metrics.jsonl",
        "loss.png",
        "steps_1",
    } <= names
    again = parse_config(nora.Config, ["--config", str(tmp_path / "config.yaml")], nora.ALIASES)
    assert again == config(base, "--output_dir", tmp_path, "--max_steps", 1)
    meta = json.loads((tmp_path / "steps_1/meta.json").read_text())
    assert (
        meta["script"] == "train_nora" and meta["step"] == 1 and meta["position"] == 4 and len(meta["validation"]) == 1
    )
    row = next(r for r in read_metrics(tmp_path) if "train_loss" in r)
    assert {
        "train_loss",
        "token_accuracy",
        "grad_norm",
        "learning_rate",
        "samples_per_s",
        "data_wait",
        "memory_gb",
    } <= row.keys()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("**/nora.yaml")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_shipped_configs_parse(path):
    cfg = parse_config(nora.Config, ["--config", str(path)], nora.ALIASES)
    assert all(
        yaml.safe_load(path.read_text()).get(k, v) is not None
        for k, v in dataclasses.asdict(cfg).items()
        if k == "model"
    )


def test_it_starts_without_wandb_torchvision_and_peft(tmp_path, base):
    """None of them is needed for a full training; a broken torchvision must not matter either."""
    blocked = tmp_path / "blocked"
    for name in ("wandb", "torchvision", "peft"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(f"raise RuntimeError('{name} is broken')")
    result = subprocess.run(
        command(base, "--output_dir", tmp_path / "run", "--max_steps", 1),
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(blocked), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]


# ---- real recordings -------------------------------------------------------------------------------------------------


def test_it_trains_on_the_real_recordings(tmp_path, base, shared):
    root = shared / "data" / "insertion_sim"
    flags = [*base, "--dataset.root_dir", root, "--cameras", "side_camera", "tool_camera", "--horizon", 10]
    nora.main(config(flags, "--check"))
    rows = run(flags, "--output_dir", tmp_path, "--max_steps", 3)
    assert len(losses(rows)) == 3 and rows[-1]["val_malformed_rate"] is not None
