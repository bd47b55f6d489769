"""Mobile VLA: the guide's tensors value by value, a policy that hears the instruction, and the training's promises."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import make_demo
import train_mobile_kosmos as mobile
from common.config import parse_config
from common.runlog import read_metrics

LEFT, RIGHT = (f"{make_demo.MOBILE_GOAL} {side}" for side in ("left", "right"))


@pytest.fixture(scope="session")
def mobile_root(tmp_path_factory):
    """6 episodes of 6 frames: three scenes, each once left and once right; every fifth file has no text."""
    folder = tmp_path_factory.mktemp("mobile")
    make_demo.write_mobile(folder, episodes=6, size=(24, 40), frames=6)
    return folder


@pytest.fixture(scope="session")
def kosmos_dir(tmp_path_factory):
    return make_demo.write_kosmos2(
        tmp_path_factory.mktemp("kosmos2"), text=(32, 2), vision=(24, 1), image_size=28, queries=5
    )


@pytest.fixture
def make(tmp_path, mobile_root, kosmos_dir):
    """make(out, **flags) -> Config of a tiny run into tmp_path/out; a flag's dot is written as two underscores."""

    def make(out="run", **flags):
        base = dict(
            model=kosmos_dir,
            dataset__data_dir=mobile_root,
            dataset__episode_pattern="*.h5",
            dataset__train_split=0.67,
            window_size=3,
            fwd_pred_next_n=4,
            batch_size=2,
            num_workers=0,
            learning_rate=1e-3,
            act_head__hidden_size=16,
            act_head__num_layers=1,
            train_setup__lora_r=2,
            trainer__accumulate_grad_batches=1,
            trainer__max_epochs=2,
            trainer__log_every_n_steps=1,
            output_dir=tmp_path / out,
        )
        argv = [word for k, v in (base | flags).items() for word in (f"--{k.replace('__', '.')}", str(v))]
        return parse_config(mobile.Config, argv, mobile.ALIASES)

    return make


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Drawing takes longer than a tiny run; test_evaluate_opens_a_checkpoint looks at real pictures."""
    monkeypatch.setattr(mobile.runlog, "plot_loss", lambda *_: "")


def train(cfg):
    """Run main -> (state of last.ckpt, metrics rows)."""
    mobile.main(cfg)
    return torch.load(Path(cfg.output_dir) / "checkpoints/last.ckpt", weights_only=True), read_metrics(cfg.output_dir)


def same(a, b, atol=0.0):
    """Every tensor of two (nested) dicts is equal."""
    assert a.keys() == b.keys()
    for k in a:
        same(a[k], b[k], atol) if isinstance(a[k], dict) else torch.testing.assert_close(
            a[k], b[k], rtol=0, atol=atol, msg=lambda m, k=k: f"{k}: {m}"
        )


def build(cfg):
    """-> (model in eval mode, Prompt, Data) of a config, LoRA's B and the action token away from their starting values, so that everything matters."""
    backbone = mobile.Backbone.open(cfg.model)
    prompt = mobile.Prompt(backbone.tokenizer, cfg.dataset.max_text_len)
    data = mobile.load_data(cfg, backbone.image_size)
    model = mobile.build_model(cfg, backbone, prompt, torch.device("cpu"), torch.float32).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model, prompt, data


def write_episode(path, actions, images=None, text=None, colours="rgb"):
    """One recording by hand; images default to frames whose every pixel is the frame's number."""
    actions = np.asarray(actions, np.float32)
    images = np.stack([np.full((28, 28, 3), t, np.uint8) for t in range(len(actions))]) if images is None else images
    with h5py.File(path, "w") as f:
        f["images"] = images if colours == "rgb" else images[..., ::-1]
        f["actions"] = (
            np.concatenate([actions, np.zeros((len(actions), 1), np.float32)], 1) if actions.shape[1] == 2 else actions
        )
        if text is not None:
            f["language_instruction"] = np.array([text.encode()], "S256")
    return path


def spec_of(**changed):
    return mobile.DataSpec(
        **(
            dict(
                window_size=8,
                fwd_pred_next_n=10,
                label_offset=0,
                image_size=28,
                colour_order="rgb",
                action_scale=[1.0, 1.0],
                instruction="x",
                name_instructions={},
                max_text_len=16,
            )
            | changed
        )
    )


def dataset_of(path, make, spec=None, **flags):
    cfg = make(dataset__colour_order="rgb", **flags)
    spec = spec or spec_of()
    data = mobile.Data([mobile.read_episode(path, path.parent, "x", {})], [0], [], [], spec, {}, "")
    return mobile.MobileVLAH5Dataset(
        data, [0], cfg, mobile.Prompt(mobile.Backbone.open(cfg.model).tokenizer, spec.max_text_len)
    )


# ---- the guide's tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1])
def test_every_key_has_the_guides_shape_and_value(make, tmp_path, offset):
    """18 frames, actions = arange, image t = t everywhere: every number of the batch says where it comes from."""
    actions = np.arange(36, dtype=np.float32).reshape(18, 2) / 100
    dataset = dataset_of(write_episode(tmp_path / "e.h5", actions), make, spec_of(label_offset=offset))
    item = dataset[(0, 0)]
    assert {
        k: tuple(item[k].shape)
        for k in ("rgb", "hand_rgb", "actions", "action_mask", "image_mask", "attention_mask", "text", "text_mask")
    } == dict(
        rgb=(18, 3, 28, 28),
        hand_rgb=(18, 3, 28, 28),
        actions=(18, 2),
        action_mask=(18,),
        image_mask=(18,),
        attention_mask=(18,),
        text=(16,),
        text_mask=(16,),
    )
    assert item["lang"] == item["raw_text"] == "x" and item["data_source"] == "mobile_vla_action"
    batch = mobile.collater([item, dataset[(1, 0)]], dataset.spec, future_images=True)
    assert {k: tuple(v.shape) for k, v in batch.items() if isinstance(v, torch.Tensor)} == dict(
        rgb=(2, 8, 3, 28, 28),
        hand_rgb=(2, 8, 3, 28, 28),
        action=(2, 17, 2),
        text=(2, 16),
        text_mask=(2, 16),
        fwd_rgb_chunck=(2, 8, 10, 3, 28, 28),
        fwd_hand_rgb_chunck=(2, 8, 10, 3, 28, 28),
        fwd_mask=(2, 8, 10),
        action_chunck=(2, 8, 10, 2),
        chunck_mask=(2, 8, 10),
        attention_mask=(2, 8),
    )
    np.testing.assert_array_equal(batch["action"][0], actions[:17])
    for i in range(8):
        assert (batch["rgb"][0, i] == i).all()
        for j in range(10):
            np.testing.assert_array_equal(batch["action_chunck"][1, i, j], actions[i + j + offset])
            assert (batch["fwd_rgb_chunck"][0, i, j] == i + 1 + j).all()
    assert (
        all(batch[k].all() for k in ("chunck_mask", "fwd_mask", "attention_mask"))
        and not batch["hand_rgb"].any()
        and not batch["fwd_hand_rgb_chunck"].any()
    )
    lean = dataset.collater([item])
    assert dataset.future_images is False
    assert lean["fwd_rgb_chunck"] is None and lean["fwd_hand_rgb_chunck"] is None


def test_process_batch_is_the_guides_tuple(make, tmp_path):
    actions = np.arange(36, dtype=np.float32).reshape(18, 2) / 100
    dataset = dataset_of(write_episode(tmp_path / "e.h5", actions, text="Navigate to the left"), make)
    (
        rgb,
        hand_rgb,
        attention_mask,
        language,
        text_mask,
        fwd_rgb,
        fwd_hand,
        velocity,
        gripper,
        velocity_chunck,
        gripper_chunck,
        chunck_mask,
        fwd_mask,
        ids,
        labels,
        mask,
        raw_text,
        rel_state,
        source,
    ) = mobile._process_batch(dataset.collater([dataset[(0, 0)]]), torch.device("cpu"))
    assert (
        rgb.shape == hand_rgb.shape == (1, 8, 3, 28, 28)
        and attention_mask.shape == (1, 8)
        and velocity.shape == (1, 8, 2)
        and velocity_chunck.shape == (1, 8, 10, 2)
    )
    np.testing.assert_array_equal(velocity[0], actions[:8])
    assert chunck_mask.dtype == fwd_mask.dtype == torch.bool and chunck_mask.shape == fwd_mask.shape == (1, 8, 10)
    assert language.shape == text_mask.shape and text_mask.all(), "cut to the longest text of the batch"
    assert (
        (fwd_rgb, fwd_hand, gripper, gripper_chunck, ids, labels, mask, rel_state) == (None,) * 8
        and raw_text == ["Navigate to the left"]
        and source == "mobile_vla_action"
    )


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    frames=st.integers(1, 30), window=st.integers(1, 9), future=st.integers(1, 11), offset=st.integers(0, 1)
)
def test_masks_are_true_exactly_where_the_episode_is(make, tmp_path, frames, window, future, offset):
    hypothesis.assume(frames > offset)
    actions = np.stack([np.arange(frames), -np.arange(frames)], 1) / 100
    spec = spec_of(window_size=window, fwd_pred_next_n=future, label_offset=offset)
    dataset = dataset_of(write_episode(tmp_path / "e.h5", actions), make, spec)
    assert dataset.windows == [(0, s) for s in range(frames - offset)]
    for s in (0, len(dataset) // 2, len(dataset) - 1):
        batch = dataset.collater([dataset[(0, s)]])
        step, ahead = np.mgrid[:window, :future]
        at = s + step + ahead + offset
        np.testing.assert_array_equal(batch["chunck_mask"][0], at < frames)
        np.testing.assert_array_equal(batch["attention_mask"][0], s + np.arange(window) < frames)
        np.testing.assert_array_equal(batch["fwd_mask"][0], s + 1 + step + ahead < frames)
        np.testing.assert_allclose(
            batch["action_chunck"][0, ..., 0][batch["chunck_mask"][0]], at[at < frames] / 100, atol=1e-6
        )
        assert batch["chunck_mask"][0, 0, 0], "every window has a label at its first step"


def test_one_window_per_episode_for_parity(make, mobile_root):
    data = mobile.load_data(make(), 28)
    assert (
        len(mobile.MobileVLAH5Dataset(data, data.train, make(dataset__windows="one"))) == 4
        and len(mobile.MobileVLAH5Dataset(data, data.train, make())) == 4 * 6
    )
    assert (
        len(mobile.MobileVLAH5Dataset(mobile.load_data(make(label_offset=1), 28), data.train, make(label_offset=1)))
        == 4 * 5
    )


# ---- episodes --------------------------------------------------------------------------------------------------------


def test_the_text_comes_from_the_file_then_its_name_then_the_config(tmp_path):
    rules = dict(left="go left", right="go right")
    for name, text, expected in (
        ("episode_20251118_101206_1box_hori_left_core", "to the right please", ("to the right please", "file")),
        ("episode_20251118_101207_1box_hori_left_core", None, ("go left", "name")),
        ("episode_20251118_101208_leftover", None, ("anything", "config")),
        ("episode_20251118_101209", "", ("anything", "config")),
    ):
        episode = mobile.read_episode(
            write_episode(tmp_path / f"{name}.h5", np.zeros((3, 2)), text=text), tmp_path, "anything", rules
        )
        assert (episode.instruction, episode.source) == expected
    assert [mobile.read_episode(p, tmp_path, "", {}).group for p in sorted(tmp_path.glob("*.h5"))] == [
        "1box_hori_left_core",
        "1box_hori_left_core",
        "leftover",
        "",
    ]


def test_stored_bgr_becomes_rgb(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (2, 28, 28, 3), dtype=np.uint8)
    for colours in ("rgb", "bgr"):
        episode = mobile.read_episode(
            write_episode(tmp_path / f"{colours}.h5", np.zeros((2, 2)), images, colours=colours), tmp_path, "x", {}
        )
        np.testing.assert_array_equal(
            mobile.read_images(episode, spec_of(colour_order=colours)), images.transpose(0, 3, 1, 2)
        )


def test_pixels_equal_those_of_kosmos_own_processor(kosmos_dir, make):
    try:
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:
        pytest.skip("this transformers has no PIL image processor")
    image = np.random.default_rng(0).integers(0, 255, (36, 64, 3), dtype=np.uint8)
    theirs = Processor.from_pretrained(kosmos_dir)(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    backbone = mobile.Backbone.open(kosmos_dir)
    ours = (mobile.resize(image, 28).transpose(2, 0, 1) / 255 - np.array(backbone.mean)[:, None, None]) / np.array(
        backbone.std
    )[:, None, None]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def episodes_of(names):
    return [
        mobile.Episode(n, n, 3, np.zeros((3, 2), np.float32), "x", "file", n.split("_", 1)[1], False)
        for n in sorted(names)
    ]


def test_the_guides_231_episodes_split_into_184_and_47():
    found = episodes_of([f"{i:03d}_{'left' if i % 3 else 'right'}" for i in range(231)])
    for how in ("chronological", "group"):
        train, validation = mobile.split_episodes(found, 0.8, how)
        assert (len(train), len(validation)) == (184, 47)
        assert how == "group" or validation == list(range(184, 231))
    held = mobile.split_episodes(found, 0.8, "held_out_groups")[1]
    assert len({found[i].group for i in held}) == 1 and len(held) in (77, 154)


@hypothesis.given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), share=st.floats(0.3, 0.95))
def test_every_group_is_held_out_in_its_share_newest_first(sizes, share):
    found = episodes_of([f"{i:02d}_{g}" for g, size in enumerate(sizes) for i in range(size)])
    hypothesis.assume(int(len(found) * share + 1e-9) > 0)
    train, validation = mobile.split_episodes(found, share, "group")
    assert (
        not set(train) & set(validation)
        and sorted(train + validation) == list(range(len(found)))
        and len(train) == int(len(found) * share + 1e-9)
    )
    for g, size in enumerate(sizes):
        held = [found[i].name for i in validation if found[i].group == str(g)]
        assert abs(len(held) - size * len(validation) / len(found)) < 1
        assert held == sorted(e.name for e in found if e.group == str(g))[size - len(held) :]


def test_nothing_of_a_validation_episode_enters_the_training(make, tmp_path):
    make_demo.write_mobile(tmp_path / "a", episodes=6, size=(24, 40), frames=6)
    cfg = make(dataset__data_dir=tmp_path / "a")
    before = mobile.load_data(cfg, 28)
    with h5py.File(before.episodes[before.validation[0]].path, "r+") as f:
        f["actions"][:] = 1.0
    after = mobile.load_data(cfg, 28)
    assert after.fingerprint == before.fingerprint and after.stats == before.stats
    with h5py.File(before.episodes[before.train[0]].path, "r+") as f:
        f["actions"][:] = 1.0
    assert mobile.load_data(cfg, 28).fingerprint != before.fingerprint


def test_bad_recordings_are_named(make, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    write_episode(folder / "episode_1.h5", np.zeros((3, 2)))
    cases = [
        ("actions_nan", lambda f: f["actions"].__setitem__((1, 0), np.nan), "'actions' frame 1 is not finite"),
        ("no_images", lambda f: f.__delitem__("images"), "no dataset 'images'"),
        (
            "short",
            lambda f: (f.__delitem__("actions"), f.create_dataset("actions", data=np.zeros((2, 3)))),
            r"expected \(3, 3\)",
        ),
        (
            "floats",
            lambda f: (f.__delitem__("images"), f.create_dataset("images", data=np.zeros((3, 4, 4, 3)))),
            "expected uint8",
        ),
    ]
    for name, spoil, message in cases:
        path = write_episode(folder / f"episode_2_{name}.h5", np.zeros((3, 2)))
        with h5py.File(path, "r+") as f:
            spoil(f)
        with pytest.raises(mobile.ep.BadEpisode, match=f"episode_2_{name}.*{message}.*skip_bad_episodes"):
            mobile.load_episodes(make(dataset__data_dir=folder).dataset)
        kept, excluded = mobile.load_episodes(make(dataset__data_dir=folder, dataset__skip_bad_episodes=True).dataset)
        assert [e.name for e in kept] == ["episode_1.h5"] and len(excluded) == 1
        path.unlink()
    (folder / "episode_3.h5").write_bytes((folder / "episode_1.h5").read_bytes()[:900])
    with pytest.raises(mobile.ep.BadEpisode, match="episode_3.h5: not a readable HDF5 file"):
        mobile.load_episodes(make(dataset__data_dir=folder).dataset)
    with pytest.raises(
        FileNotFoundError, match="none of the 2 files .* matches dataset.episode_pattern 'episode_2025111"
    ):
        mobile.load_episodes(make(dataset__data_dir=folder, dataset__episode_pattern="episode_2025111*.h5").dataset)
    with pytest.raises(FileNotFoundError, match="No HDF5 files found"):
        mobile.load_episodes(make(dataset__data_dir=tmp_path / "nowhere").dataset)


def write_damaged(path):
    """4 frames, of which frame 2 is damaged on disk."""
    with h5py.File(path, "w") as f:
        f.create_dataset(
            "images",
            data=np.random.default_rng(0).integers(0, 255, (4, 28, 28, 3), dtype=np.uint8),
            chunks=(1, 28, 28, 3),
            compression="gzip",
        )
        f["actions"] = np.zeros((4, 3), np.float32)
        chunk = f["images"].id.get_chunk_info(2)
    with open(path, "r+b") as f:
        f.seek(chunk.byte_offset)
        f.write(b"\0" * chunk.size)


def test_images_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "episode_1.h5"
    write_damaged(path)
    episode = mobile.read_episode(path, tmp_path, "x", {})
    with pytest.raises(mobile.ep.BadEpisode, match="episode_1.h5: dataset 'images' frame 2 cannot be read"):
        mobile.read_images(episode, spec_of())


def test_the_image_cache_is_bounded(make, mobile_root):
    data = mobile.load_data(make(), 28)
    frames = mobile.Frames(data.spec, gigabytes=2.5 * 6 * 28 * 28 * 3 / 1e9)
    for e in data.episodes:
        np.testing.assert_array_equal(frames.of(e), mobile.read_images(e, data.spec))
    assert len(frames.kept) == 2


def test_velocities_are_scaled_and_come_back(make):
    spec = spec_of(action_scale=[1.15, 0.5])
    metres = np.array([[1.15, -0.5], [-0.575, 0.25], [0, 0]], np.float32)
    np.testing.assert_allclose(mobile.scale_actions(metres, spec), [[1, -1], [-0.5, 0.5], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(mobile.unscale_actions(mobile.scale_actions(metres, spec), spec), metres, atol=1e-6)


def test_what_looks_wrong_in_the_data_is_said(make, tmp_path, capsys):
    for i in range(4):
        write_episode(
            tmp_path / f"episode_2025111{i}_080000_hori_left.h5",
            np.full((3, 3), 2.0),
            text="to the right" if i == 0 else "to the left",
        )
    mobile.main(make(dataset__data_dir=tmp_path, dataset__train_split=0.75, check=True))
    said = capsys.readouterr().out
    for text in (
        "9 of 9 actions exceed dataset.action_scale",
        "named after one side and instruct the other, e.g. episode_20251110",
        "4 episode(s) turn",
        "repeat the actions of a training episode",
        "chunck_mask",
        "check passed",
    ):
        assert text in said
    for i in range(4):
        write_episode(tmp_path / f"episode_2025111{i}_080000_hori_left.h5", np.zeros((3, 3)), text="go")
    mobile.main(make(dataset__data_dir=tmp_path, dataset__train_split=0.75, check=True, model="no/such-model"))
    said = capsys.readouterr().out
    assert (
        "every training episode has the same instruction" in said
        and "text tokens are not shown" in said
        and "check passed" in said
    )


# ---- model -----------------------------------------------------------------------------------------------------------


def test_real_size_counts_of_adapters_and_head():
    from transformers import Kosmos2Config, Kosmos2Model

    with torch.device("meta"):
        for scope, linears, parameters in (
            ("text_attention", 96, 12_582_912),
            ("text", 144, 28_311_552),
            ("all", 293, 43_089_920),
        ):
            vlm = Kosmos2Model(Kosmos2Config()).requires_grad_(False)
            assert scope != "text" or sum(p.numel() for p in vlm.parameters()) == 1_664_485_376
            assert len(mobile.add_lora(vlm, scope, 32, 16, 0.1)) == linears
            assert sum(p.numel() for p in vlm.parameters() if p.requires_grad) == parameters
        head = mobile.MobileVLALSTMDecoder(2048, 512, 4, 8, 10)
        assert (
            sum(p.numel() for p in head.rnn.parameters()) == 11_550_720
            and sum(p.numel() for p in head.mlp.parameters()) == 1_186_580
        )
        assert head(torch.zeros(2, 8, 1, 2048))[0].shape == (2, 8, 10, 2) and head(torch.zeros(2, 8, 2048))[1] is None


def test_the_layout_is_kosmos_own_with_the_action_token_behind_the_text(make):
    """Against Kosmos2Model called the usual way: <s> <image> 5 places </image> <grounding> text </s>, ids and mask written by hand, and one embedding more."""
    model, prompt, data = build(make())
    image = torch.randint(0, 255, (1, 3, 28, 28), dtype=torch.uint8)
    ids, mask = prompt.tokens(LEFT)
    text = ids[mask]
    assert (
        prompt.tokenizer.convert_ids_to_tokens(text.tolist())[:3] == ["<s>", "<grounding>", "▁Navigate"]
        and text[-1] == prompt.tokenizer.eos_token_id
    )
    native = torch.cat([text[:1], torch.tensor([prompt.image_ids[0], *range(4, 9), prompt.image_ids[1]]), text[1:]])[
        None
    ]
    places = torch.zeros_like(native)
    places[:, 2:7] = 1
    vlm = model.backbone
    words = vlm.text_model.model.embed_tokens(native)
    pixels = (image.float() / 255 - model.mean[:, None, None]) / model.std[:, None, None]
    hidden = vlm(
        pixel_values=pixels,
        inputs_embeds=torch.cat([words, model.action_token[None, None]], 1),
        image_embeds_position_mask=torch.cat([places, torch.zeros(1, 1, dtype=torch.long)], 1),
        attention_mask=torch.ones(1, native.shape[1] + 1, dtype=torch.long),
    ).last_hidden_state
    ours = model.encode(model.image_embeds(image), ids[None], mask[None])
    torch.testing.assert_close(ours, hidden[:, -1], rtol=1e-4, atol=1e-5)


def test_every_image_token_and_every_word_reaches_the_action_token(make):
    model, prompt, _ = build(make())
    ids, mask = (x[None] for x in prompt.tokens(LEFT))
    embeds = model.image_embeds(torch.randint(0, 255, (1, 3, 28, 28), dtype=torch.uint8)).requires_grad_()
    model.encode(embeds, ids, mask).square().sum().backward()
    assert (embeds.grad.abs().sum(-1) > 0).all()
    state = model.encode(embeds, ids, mask)
    for position in range(1, int(mask.sum())):
        other = ids.clone()
        other[0, position] = 30 if ids[0, position] != 30 else 31
        assert (model.encode(embeds, other, mask) - state).abs().max() > 1e-4, position


def inputs_of(model, prompt, B=2, W=3, texts=(LEFT, "Navigate to the target location")):
    torch.manual_seed(3)
    tokens = [prompt.tokens(t) for t in texts[:B]]
    return (
        torch.randint(0, 255, (B, W, 3, 28, 28), dtype=torch.uint8),
        torch.stack([t for t, _ in tokens]),
        torch.stack([m for _, m in tokens]),
    )


def test_the_text_changes_the_answer(make):
    model, prompt, _ = build(make())
    rgb, _, _ = inputs_of(model, prompt, B=1)
    answers = [model(rgb, *(x[None] for x in prompt.tokens(text)))[0] for text in (LEFT, RIGHT)]
    assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_a_frame_changes_only_the_steps_from_it_on(make):
    model, prompt, _ = build(make())
    rgb, text, mask = inputs_of(model, prompt)
    before = model(rgb, text, mask)[0]
    for k in range(3):
        changed = rgb.clone()
        changed[:, k] = 255 - changed[:, k]
        after = model(changed, text, mask)[0]
        torch.testing.assert_close(after[:, :k], before[:, :k], rtol=0, atol=1e-6)
        assert ((after[:, k:] - before[:, k:]).abs().amax((2, 3)) > 1e-6).all()


def test_padding_and_the_rest_of_the_batch_change_nothing(make):
    """Longer padding of the text, frames beyond the episode, and other samples beside it."""
    model, prompt, _ = build(make())
    rgb, text, mask = inputs_of(model, prompt)
    together = model(rgb, text, mask)[0]
    for b in range(2):
        n = int(mask[b].sum())
        alone = model(rgb[b : b + 1], text[b : b + 1, :n], mask[b : b + 1, :n])[0]
        torch.testing.assert_close(alone[0], together[b], rtol=0, atol=1e-5)
    exists = torch.tensor([[True, True, False], [True, True, True]])
    nonsense = rgb.clone()
    nonsense[0, 2] = 255
    torch.testing.assert_close(model(nonsense, text, mask, exists)[0][0, :2], together[0, :2], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(nonsense, text, mask, exists)[0][1], together[1], rtol=0, atol=1e-5)


def test_padded_labels_change_no_loss(make):
    model, prompt, data = build(make())
    dataset = mobile.MobileVLAH5Dataset(data, data.train, make(), prompt)
    batch = dataset.collater([dataset[(0, 4)], dataset[(1, 11)]])
    assert not batch["chunck_mask"].all() and not batch["attention_mask"].all()
    loss, sample = mobile.compute_loss(model, mobile._process_batch(batch, torch.device("cpu")))
    batch["action_chunck"] = torch.where(batch["chunck_mask"][..., None], batch["action_chunck"], 77.0)
    batch["rgb"] = torch.where(batch["attention_mask"][:, :, None, None, None], batch["rgb"], 77).to(torch.uint8)
    again, _ = mobile.compute_loss(model, mobile._process_batch(batch, torch.device("cpu")))
    assert (
        again["loss"].item() == pytest.approx(loss["loss"].item(), rel=1e-6)
        and loss["loss_velocity_act"] is loss["loss_arm_act"]
    )
    elements = batch["chunck_mask"].sum((1, 2))
    assert (sample * elements).sum() / elements.sum() == pytest.approx(loss["loss"].item(), rel=1e-5)


def test_huber_by_hand():
    head = mobile.MobileVLALSTMDecoder(4, 4, 1, 2, 2)
    velocities = torch.tensor([[[[0.5, 0.0], [2.0, 0.0]], [[0.0, 0.0], [9.0, 9.0]]]])  # (1, 2, 2, 2)
    mask = torch.tensor([[[True, True], [True, False]]])
    out = head.loss((velocities, None), (torch.zeros_like(velocities), None), mask)
    assert (
        out["loss_velocity"].item() == pytest.approx((0.125 + 1.5) / 6)
        and out["loss_gripper"] is None
        and out["acc_gripper"] is None
    )
    assert head.loss((velocities, None), (torch.zeros_like(velocities), None), mask, count=13)[
        "loss_velocity"
    ].item() == pytest.approx(1.625 / 13)
    assert (
        head.loss((velocities, None), (torch.zeros_like(velocities), None), mask & False)["loss_velocity"].item() == 0
    )


def test_streaming_equals_the_batch_and_the_rollout(make, mobile_root):
    """One image at a time, over more frames than the window: the answers of predict on lists of the last W frames, and of a whole rollout."""
    model, prompt, data = build(make())
    policy = mobile.Policy(model, prompt, data.spec, data.stats)
    frames = mobile.read_images(data.episodes[0], data.spec).transpose(0, 2, 3, 1)
    rollout = mobile.unscale_actions(policy.rollout(torch.from_numpy(frames.transpose(0, 3, 1, 2)), LEFT), data.spec)
    batch = policy.predict([dict(images=list(frames[max(0, t - 2) : t + 1]), instruction=LEFT) for t in range(6)])
    for t in range(6):
        streamed = policy.predict(frames[t], LEFT)
        assert streamed.shape == (4, 2) and streamed.dtype == np.float32
        np.testing.assert_allclose(streamed, batch[t], atol=1e-5)
        np.testing.assert_allclose(streamed, rollout[t], atol=1e-5)
    np.testing.assert_allclose(
        policy.predict(frames[0], RIGHT), policy.predict([dict(images=[frames[0]], instruction=RIGHT)])[0], atol=1e-5
    )  # another text starts anew
    policy.reset()
    np.testing.assert_allclose(policy.predict(list(frames[:3]), LEFT), batch[2], atol=1e-5)  # several at once
    direct = model(
        torch.from_numpy(frames[:3].transpose(0, 3, 1, 2))[None].contiguous(), *(x[None] for x in prompt.tokens(LEFT))
    )[0][0, -1]  # what the training computes
    np.testing.assert_allclose(mobile.unscale_actions(direct.detach(), data.spec), batch[2], atol=1e-5)
    for wrong, message in ((frames[0].astype(np.float32), "expected uint8"), (frames[0][..., :1], "expected uint8")):
        with pytest.raises(ValueError, match=message):
            policy.predict(wrong, LEFT)
    with pytest.raises(ValueError, match="expected 1 to 3 frames"):
        policy.predict([dict(images=list(frames[:4]), instruction=LEFT)])


def test_the_backbone_stays_frozen_and_its_dropout_off(make):
    model, prompt, data = build(make(train_setup__lora_dropout=0.5))
    assert all(
        ("lora_" in n) or n.startswith(("act_head.", "action_token"))
        for n, p in model.named_parameters()
        if p.requires_grad
    )
    assert not any("vision" in n or "projection" in n for n, p in model.named_parameters() if p.requires_grad)
    rgb, text, mask = inputs_of(model, prompt)
    model.train()
    noisy = [model(rgb, text, mask)[0] for _ in range(2)]
    assert not torch.equal(*noisy), "the adapters' dropout is on"
    for module in model.backbone.modules():
        if isinstance(module, mobile.LoraLinear):
            module.dropout = 0.0
    assert torch.equal(model(rgb, text, mask)[0], model(rgb, text, mask)[0]), "and nothing else's"


def test_two_instructions_on_one_image_can_be_told_apart(make):
    """What the code behind the guide cannot do at any rank or epoch: opposite velocities for the same picture."""
    cfg = make(act_head__hidden_size=32)
    model, prompt, _ = build(cfg)
    tokens = [prompt.tokens(t) for t in (LEFT, RIGHT)]
    text, mask = torch.stack([t for t, _ in tokens]), torch.stack([m for _, m in tokens])
    embeds = model.image_embeds(torch.randint(0, 255, (1, 3, 28, 28), dtype=torch.uint8))[None].expand(2, 3, -1, -1)
    labels = torch.tensor([0.5, -0.5])[:, None, None, None].expand(2, 3, 4, 2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(50):
        loss = model.act_head.loss(model(embeds, text, mask), (labels, None), torch.ones(2, 3, 4, dtype=torch.bool))[
            "loss_velocity"
        ]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    target = np.array(
        [[[1.0, 1.0], [1.0, -1.0]], [[0.0, 0.2], [9.0, 9.0]]], np.float32
    )  # (T=2, N=2, 2), the last one does not exist
    predicted = np.array([[[1.0, 0.5], [0.0, 0.1]], [[0.0, 0.0], [0.0, 0.0]]], np.float32)
    exists = np.array([[True, True], [True, False]])
    out = mobile.named(mobile.measure(predicted, target, exists, [2.0, 10.0]))
    assert out["mae_x"] == pytest.approx(2 * 1 / 3) and out["mae_y"] == pytest.approx(10 * (0.5 + 1.1 + 0.2) / 3)
    assert out["rmse_y"] == pytest.approx(10 * math.sqrt((0.25 + 1.21 + 0.04) / 3)), (
        "a true root of a mean square, not of a Huber loss"
    )
    assert out["loss"] == pytest.approx((0.125 + 0.5 + 0.6 + 0.02) / 6)
    assert out["direction"] == 0.5, "of the two steps that turn, one has the right sign"
    assert out["class9"] == pytest.approx(2 / 3)
    assert mobile.named(mobile.measure(predicted, target, exists & False, [1, 1])) == {}


def test_blind_predictors_by_hand():
    episodes = episodes_of(["1_a", "2_a"])
    episodes[0].actions, episodes[1].actions = (
        np.array([[0, 0], [1, 1], [1, 0]], np.float32),
        np.array([[0, 0], [1, -1]], np.float32),
    )
    episodes[1].num_frames = 2
    blind = mobile.Blind(episodes, spec_of(fwd_pred_next_n=2, label_offset=1))
    p = blind.predictions(3)
    np.testing.assert_allclose(p["mean"], np.broadcast_to([0.6, 0.0], (3, 2, 2)), atol=1e-6)
    np.testing.assert_allclose(p["per_time"], [[[1, 0], [1, 0]], [[1, 0], [0.6, 0]], [[0.6, 0], [0.6, 0]]], atol=1e-6)
    assert not p["zeros"].any()


def test_the_swapped_instruction():
    assert mobile.other_instruction(LEFT, []) == RIGHT and mobile.other_instruction(RIGHT, [LEFT]) == LEFT
    assert (
        mobile.other_instruction("go home", ["go home", "stay"]) == "stay"
        and mobile.other_instruction("go home", ["go home"]) is None
    )
    assert [
        mobile.Episode("", "", 1, None, text, "", "", False).side
        for text in (LEFT, "Turn Right.", "left or right", "leftover")
    ] == ["left", "right", "other", "other"]


class TwoSided:
    """Stands for a policy that reads: +0.5 for left, -0.5 for right; a deaf one answers +0.5 always."""

    def __init__(self, spec, deaf):
        self.spec, self.deaf, self.model = spec, deaf, torch.nn.Identity()

    def rollout(self, vision_x, instruction):
        sign = 1.0 if self.deaf or "left" in instruction else -1.0
        return np.full((len(vision_x), self.spec.fwd_pred_next_n, 2), 0.5 * sign, np.float32)


@pytest.mark.parametrize("deaf", [False, True])
def test_the_swap_test_tells_a_reader_from_a_deaf_policy(make, deaf):
    data = mobile.load_data(make(), 28)
    dataset = mobile.MobileVLAH5Dataset(data, range(6), make())
    v = mobile.validate(
        TwoSided(data.spec, deaf), dataset, mobile.Blind(dataset.episodes, data.spec), [LEFT, RIGHT], 0, 1, lambda x: x
    )
    assert v["swap_change"] == pytest.approx(0.0 if deaf else 1.15) and v["swap_flip"] == (0.0 if deaf else 1.0)
    assert (
        v["val_direction_accuracy"] == pytest.approx(0.5 if deaf else 1.0, abs=0.2 if deaf else 0)
        and v["val_left_direction_accuracy"] == 1.0
    )
    halves = [
        mobile.validate(
            TwoSided(data.spec, deaf),
            dataset,
            mobile.Blind(dataset.episodes, data.spec),
            [LEFT, RIGHT],
            0,
            1,
            lambda x: x,
        )["val_loss"]
    ]
    assert halves[0] == v["val_loss"] and v["val_loss"] == v["val_loss_velocity_act"] == v["val_loss_arm_act"]


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        dict(),
        dict(
            num_workers=2,
            batch_size=1,
            trainer__accumulate_grad_batches=3,
            train_setup__lora_dropout=0.3,
            scheduler="cosine",
        ),
    ],
    ids=["0-workers", "accumulation-2-workers"],
)
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(make, flags, monkeypatch, tmp_path):
    straight, _ = train(make("straight", **flags))
    step = mobile.runlog.RunLog.step

    def kill_at_2(self, number, *args):
        step(self, number, *args)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as m:
        m.setattr(mobile.runlog.RunLog, "step", kill_at_2)
        stopped, _ = train(make("stopped", **flags))
    assert (
        stopped["step"] == 3 and [p.name for p in (tmp_path / "stopped/checkpoints").glob("epoch*")] == []
    )  # mid-epoch: only last.ckpt
    resumed, rows = train(make("stopped", resume="auto", **flags))
    same(resumed["trained"], straight["trained"])
    same(resumed["moments"], straight["moments"])
    assert resumed["position"] == straight["position"] and resumed["val_loss"] == straight["val_loss"]
    assert [r["step"] for r in rows if "train_loss" in r] == list(range(1, straight["step"] + 1))
    assert sorted(p.name for p in (tmp_path / "stopped/checkpoints").iterdir()) == sorted(
        p.name for p in (tmp_path / "straight/checkpoints").iterdir()
    )


def test_the_best_three_and_the_last_are_kept_over_a_resume(make, monkeypatch, tmp_path):
    """Six epochs with val_loss 5 1 4 2 nan 3, stopped after the third by its number of epochs."""
    losses = iter([5.0, 1.0, 4.0, 2.0, math.nan, 3.0])
    monkeypatch.setattr(mobile, "validate", lambda *_: dict(val_loss=next(losses)))
    monkeypatch.setattr(mobile, "say_validation", lambda *_: "")
    folder = tmp_path / "run/checkpoints"
    names = lambda: sorted(p.name for p in folder.glob("*.ckpt"))
    mobile.main(make(trainer__max_epochs=3))
    assert names() == [
        "epoch_00-val_loss=5.000.ckpt",
        "epoch_01-val_loss=1.000.ckpt",
        "epoch_02-val_loss=4.000.ckpt",
        "last.ckpt",
    ]
    mobile.main(make(trainer__max_epochs=6, resume="auto"))
    assert names() == [
        "epoch_01-val_loss=1.000.ckpt",
        "epoch_03-val_loss=2.000.ckpt",
        "epoch_05-val_loss=3.000.ckpt",
        "last.ckpt",
    ]
    last = mobile.read_checkpoint(folder / "last.ckpt")
    assert (
        last["epoch"] == 5 and last["position"] == 6 * 24 and mobile.read_checkpoint(folder / names()[0])["step"] == 24
    )
    assert not list(folder.glob(".tmp*"))


def test_epochs_are_counted_by_what_a_step_finished(make, tmp_path):
    assert [mobile.epoch_after(*k, 24) for k in ((0, 5), (20, 25), (25, 30), (45, 50), (0, 48))] == [0, 0, 1, 1, 1]
    state, rows = train(
        make(batch_size=5, trainer__max_epochs=2, trainer__save_top_k=2)
    )  # 24 windows: steps of 5 cross the end of the epoch
    assert [p.name[:8] for p in sorted((tmp_path / "run/checkpoints").glob("epoch*"))] == [
        "epoch_00",
        "epoch_01",
    ] and state["position"] == 50
    assert [r["step"] for r in rows if "val_loss" in r] == [5, 10]


def test_resume_auto_takes_the_newest_epoch_where_the_last_is_gone(make, tmp_path):
    train(make())
    (tmp_path / "run/checkpoints/last.ckpt").unlink()
    state, rows = train(make(trainer__max_epochs=3, resume="auto"))
    assert state["epoch"] == 2 and [r["step"] for r in rows if "train_loss" in r] == list(range(1, 37))


def test_an_epoch_that_is_done_again_replaces_its_file(make, monkeypatch, tmp_path):
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(mobile, "validate", lambda *_: dict(val_loss=next(losses)))
    monkeypatch.setattr(mobile, "say_validation", lambda *_: "")
    train(make(trainer__max_epochs=2))
    first = tmp_path / "run/checkpoints/epoch_00-val_loss=2.000.ckpt"
    train(make(trainer__max_epochs=2, resume=first))
    assert sorted(p.name for p in first.parent.glob("epoch*")) == [
        "epoch_00-val_loss=2.000.ckpt",
        "epoch_01-val_loss=3.000.ckpt",
    ]


def test_a_checkpoint_holds_only_what_was_trained(make, tmp_path):
    state, rows = train(make(trainer__max_epochs=1))
    assert all("lora_" in k or k.startswith(("act_head.", "action_token")) for k in state["trained"]) and set(
        state["moments"]
    ) == set(state["trained"])
    assert (
        state["meta"] == dict(script="train_mobile_kosmos", validation=state["meta"]["validation"])
        and len(state["meta"]["validation"]) == 2
    )
    numbers = sum(v.numel() for v in state["trained"].values())
    size = (tmp_path / "run/checkpoints/last.ckpt").stat().st_size
    assert 12 * numbers < size < 12 * numbers + 300_000
    validation = next(r for r in rows if "val_loss" in r)
    assert {
        "val_mae_linear_x",
        "val_direction_accuracy",
        "val_left_mae_linear_y",
        "blind_zeros_loss",
        "blind_mean_loss",
        "blind_per_time_loss",
        "swap_change",
        "val_mae_step_4",
    } <= set(validation)
    assert (tmp_path / "run/validation_episodes.txt").read_text().count("[") == 3


def test_a_loaded_policy_predicts_what_was_trained(make, tmp_path, mobile_root, monkeypatch):
    seen = {}
    original = mobile.validate

    def spy(policy, dataset, *rest):
        policy.model.eval()
        seen["rollout"] = policy.rollout(
            torch.from_numpy(dataset.frames.of(dataset.episodes[0])), dataset.episodes[0].instruction
        )
        return original(policy, dataset, *rest)

    monkeypatch.setattr(mobile, "validate", spy)
    state, _ = train(make(trainer__max_epochs=1, label_offset=1))
    for source in (tmp_path / "run/checkpoints/last.ckpt", tmp_path / "run"):
        policy = mobile.load_policy(source, "cpu")
        episode = next(policy.open_episodes(mobile_root, state["meta"]["validation"][:1]))
        predicted = policy.predict([episode["sample"](t) for t in range(6)])
        np.testing.assert_allclose(predicted, mobile.unscale_actions(seen["rollout"], policy.spec), atol=1e-5)
    assert episode["target"].shape == (5, 2) and np.abs(episode["target"]).max() == pytest.approx(1.15), (
        "label_offset 1: row t is the action after frame t, m/s"
    )
    with pytest.raises(ValueError, match="has no episode 'nothing.h5'"):
        next(policy.open_episodes(mobile_root, ["nothing.h5"]))


def test_evaluate_opens_a_checkpoint(make, tmp_path, mobile_root, monkeypatch):
    monkeypatch.undo()
    cfg = make(trainer__max_epochs=1)
    train(cfg)
    assert (tmp_path / "run/loss.png").stat().st_size > 5000
    report = evaluate.main(
        [
            "--checkpoint",
            str(tmp_path / "run/checkpoints/last.ckpt"),
            "--data",
            str(mobile_root),
            "--output",
            str(tmp_path / "report"),
            "--device",
            "cpu",
        ]
    )
    assert set(report) == {"policy", "hold still", "mean action"} and set(report["policy"]["per_dim"]) == {
        "linear_x",
        "linear_y",
    }
    assert (
        len(json.loads((tmp_path / "report/report.json").read_text())["episodes"]) == 2
        and len(list((tmp_path / "report").glob("*.png"))) == 3
    )


def test_accumulation_equals_one_big_batch(make):
    """Windows with padded ends: the loss is divided by the supervised elements of the whole optimizer step."""
    flags = dict(train_setup__lora_dropout=0, trainer__max_epochs=1, learning_rate=1e-4)
    big, rows = train(make("big", batch_size=6, **flags))
    small, others = train(make("small", batch_size=2, trainer__accumulate_grad_batches=3, **flags))
    assert big["step"] == small["step"] == 4
    for a, b in zip(rows, others):
        for key in ("train_loss", "train_grad_norm", "val_loss"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4)
    worst = max(
        (small["moments"][k]["exp_avg"] - v["exp_avg"]).abs().max().item() / (v["exp_avg"].abs().max().item() + 1e-9)
        for k, v in big["moments"].items()
    )
    assert worst < 1e-3, "the same gradients went into the moments"


def test_the_gradient_clipping_works(make):
    """After one step AdamW's first moment is a tenth of the gradient that it was given."""
    norm = lambda state: math.sqrt(sum(v["exp_avg"].double().square().sum().item() for v in state["moments"].values()))
    free, rows = train(make("free", trainer__max_steps=1, trainer__gradient_clip_val=0))
    clipped, others = train(make("clipped", trainer__max_steps=1, trainer__gradient_clip_val=1e-3))
    assert rows[0]["train_grad_norm"] == others[0]["train_grad_norm"] > 1e-2 and norm(free) == pytest.approx(
        0.1 * rows[0]["train_grad_norm"], rel=1e-4
    )
    assert norm(clipped) == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_two_ranks_equal_one_with_twice_the_batch(make, tmp_path):
    """The real launcher (gloo, CPU)."""
    flags = dict(
        train_setup__lora_dropout=0,
        trainer__max_epochs=1,
        learning_rate=1e-4,
        trainer__accumulate_grad_batches=2,
        trainer__max_steps=2,
    )
    one, rows = train(make("one", batch_size=4, **flags))
    cfg = make("two", batch_size=2, **flags)
    mobile.save_config(cfg, tmp_path / "two.yaml")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "train_mobile_kosmos.py",
            "--config",
            str(tmp_path / "two.yaml"),
        ],
        cwd=Path(mobile.__file__).parent,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        check=True,
        capture_output=True,
        timeout=300,
    )
    two = torch.load(tmp_path / "two/checkpoints/last.ckpt", weights_only=True)
    same(two["trained"], one["trained"], atol=2e-6)
    for a, b in zip(rows, read_metrics(tmp_path / "two")):
        assert a["step"] == b["step"]
        for key in ("train_loss", "train_grad_norm", "val_loss", "swap_change", "val_mae_linear_y"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4), key
    resumed, _ = train(
        make("two", resume="auto", batch_size=4, **(flags | dict(trainer__max_steps=0)))
    )  # one rank goes on where two stopped
    straight, _ = train(make("straight", batch_size=4, **(flags | dict(trainer__max_steps=0))))
    same(resumed["trained"], straight["trained"], atol=2e-6)


def test_ranks_take_disjoint_shares_of_one_order(make):
    order = mobile.GlobalOrder(24, 123)
    one = [i for b in mobile.RankBatches(order, 4, 1, steps=6) for i in b]
    two = [
        i
        for b in zip(*(mobile.RankBatches(order, 2, 1, rank, 2, steps=6) for rank in (0, 1)))
        for part in b
        for i in part
    ]
    assert one == two and sorted(i for _, i in one) == list(range(24))


def test_dropout_belongs_to_the_position(make, monkeypatch):
    """Every micro-batch draws its own noise, keyed by the position of its first window: 24 windows in micro-batches of 2, three to a step."""
    keys, seeds, draw, manual_seed = [], [], mobile.torch_seed_at, torch.manual_seed
    monkeypatch.setattr(mobile, "torch_seed_at", lambda *key: keys.append(key) or draw(*key))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    train(make(trainer__accumulate_grad_batches=3, trainer__max_epochs=1))
    assert keys == [(123, p, "dropout") for p in range(0, 24, 2)]
    assert len({draw(*k) for k in keys}) == 12 and {draw(*k) for k in keys} <= set(seeds)


def test_image_embeddings_from_the_cache_give_the_same_training(make, tmp_path, monkeypatch):
    plain, rows = train(make("plain", trainer__max_epochs=1))
    cached, others = train(make("cached", trainer__max_epochs=1, dataset__feature_cache=tmp_path / "cache"))
    same(cached["trained"], plain["trained"], atol=1e-5)
    files = list((tmp_path / "cache").rglob("*.pt"))
    assert len(files) == 6 and torch.load(files[0], weights_only=True)["features"].shape == (6, 5, 32)
    monkeypatch.setattr(
        mobile, "read_images", lambda *_: pytest.fail("an image was read although all embeddings are there")
    )
    train(make("again", trainer__max_epochs=1, dataset__feature_cache=tmp_path / "cache"))
    with pytest.raises(ValueError, match="frozen vision tower"):
        mobile.main(make("all", dataset__feature_cache=tmp_path / "cache", train_setup__lora_scope="all"))


def test_other_scopes_train(make):
    everything, _ = train(make("all", train_setup__lora_scope="all", trainer__max_steps=1))
    assert any("vision_model" in k for k in everything["trained"]) and any(
        "image_to_text_projection" in k for k in everything["trained"]
    )
    assert all(v["exp_avg"].abs().sum() > 0 for k, v in everything["moments"].items() if k.endswith("lora_B")), (
        "gradients reach the vision tower"
    )
    none, _ = train(make("none", train_setup__lora_enable=False, trainer__max_steps=1))
    assert not any("lora" in k for k in none["trained"]) and "action_token" in none["trained"]


def test_a_non_finite_step_is_skipped_and_named(make, monkeypatch, capsys):
    original, calls = mobile.compute_loss, []

    def spoiled(model, inputs, count=None):
        losses, sample = original(model, inputs, count)
        calls.append(1)
        if len(calls) == 2:
            losses["loss"], sample = losses["loss"] * math.nan, sample * math.nan
        return losses, sample

    monkeypatch.setattr(mobile, "compute_loss", spoiled)
    state, rows = train(make(trainer__max_steps=3))
    assert (
        state["skipped"] == 1
        and all(v["step"] == 2 for v in state["moments"].values())
        and all(torch.isfinite(v).all() for v in state["trained"].values())
    )
    assert "NON-FINITE step 2 skipped, weights unchanged: loss of episode_2025" in capsys.readouterr().out
    monkeypatch.setattr(
        mobile,
        "compute_loss",
        lambda *a: (lambda r: ({k: v * math.inf for k, v in r[0].items()}, r[1] * math.inf))(original(*a)),
    )
    with pytest.raises(FloatingPointError, match="10 steps in a row"):
        mobile.main(make("always"))


def test_fp16_overflow_lowers_the_scale_and_costs_a_step_not_the_weights(make, monkeypatch, capsys):
    """16-mixed is for CUDA; here the CPU is told to do it. The first scale is absurdly high, so that gradients overflow until it fits."""
    monkeypatch.setattr(mobile, "pick_precision", lambda wanted, device: torch.float16)
    layer_norm, scaler = torch.nn.functional.layer_norm, torch.amp.GradScaler
    floats = lambda x: None if x is None else x.float()
    monkeypatch.setattr(
        torch.nn.functional,
        "layer_norm",
        lambda x, shape, weight=None, bias=None, eps=1e-5: layer_norm(
            floats(x), shape, floats(weight), floats(bias), eps
        ),
    )  # as CUDA's autocast does
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**36, enabled=enabled)
    )
    straight, rows = train(make("straight", trainer__max_epochs=2))
    assert "fp16 gradients overflowed" in capsys.readouterr().out
    lowered = straight["rescaled"]
    assert (
        5 < lowered < straight["step"]
        and straight["skipped"] == 0
        and straight["scaler"]["scale"] == 2.0 ** (36 - lowered)
    )
    assert {v["step"].item() for v in straight["moments"].values()} == {straight["step"] - lowered} and all(
        torch.isfinite(v).all() for v in straight["trained"].values()
    )
    train(make("stopped", trainer__max_epochs=2, trainer__max_steps=10))
    resumed, _ = train(make("stopped", trainer__max_epochs=2, resume="auto"))
    same(resumed["trained"], straight["trained"])  # the scale went on, too
    assert resumed["scaler"] == straight["scaler"] and resumed["rescaled"] == lowered


def test_precision_and_devices(make, monkeypatch):
    assert [mobile.pick_precision(p, "cuda") for p in ("16-mixed", "bf16-mixed", "32-true")] == [
        torch.float16,
        torch.bfloat16,
        None,
    ]
    assert {mobile.pick_precision(p, d) for p in ("16-mixed", "bf16-mixed", "32-true") for d in ("mps", "cpu")} == {
        None
    }
    monkeypatch.setattr(mobile, "pick_device", lambda local: torch.device("mps"))
    monkeypatch.setattr(mobile.dist, "init_process_group", lambda *_: pytest.fail("MPS has no process group"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes on MPS"):
        mobile.main(make())


def test_learning_rate_by_step():
    cfg = mobile.Config()
    assert [mobile.lr_at(k, cfg, 23) for k in (0, 1, 2, 500)] == pytest.approx(
        [1e-4 / 2.3, 2e-4 / 2.3, 1e-4, 1e-4]
    )  # a tenth of 23 steps of warm-up
    cfg.scheduler = "cosine"
    assert mobile.lr_at(230, cfg, 23) == mobile.lr_at(10_000, cfg, 23) == pytest.approx(1e-7) and mobile.lr_at(
        116, cfg, 23
    ) == pytest.approx(5e-5, rel=0.02)
    cfg.warmup_epochs = 0.0
    assert mobile.lr_at(0, cfg, 23) == pytest.approx(1e-4)


def test_a_resume_that_would_mean_something_else_is_refused(make, tmp_path):
    train(make(trainer__max_steps=1))
    other = make_demo.write_kosmos2(tmp_path / "other", seed=5, text=(32, 2), vision=(24, 1), image_size=28, queries=5)
    with torch.no_grad():  # random vectors are 0 or 1 in both: make one differ, as in two trained models
        from safetensors.torch import load_file, save_file

        tensors = load_file(other / "model.safetensors")
        tensors["text_model.model.layer_norm.weight"] += 0.1
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for flags, message in (
        (dict(seed=1), "seed 123, now 1"),
        (dict(label_offset=1), "label_offset 0, now 1"),
        (dict(train_setup__lora_r=4), "lora_r 2, now 4"),
        (dict(window_size=4), "window_size 3, now 4"),
        (dict(dataset__train_split=0.5), "windows changed"),
        (dict(dataset__windows="one"), "windows changed"),
        (dict(dataset__colour_order="rgb"), "colour_order bgr, now rgb"),
        (dict(model=other), "digest"),
        (dict(trainer__max_steps=1), "nothing to do"),
        (dict(resume=tmp_path / "x.ckpt"), "no such checkpoint"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            mobile.main(make(**(dict(resume="auto", trainer__max_steps=4) | flags)))
    with pytest.raises(FileExistsError, match="--resume auto"):
        mobile.main(make())
    with pytest.raises(ValueError, match="digest"):
        mobile.load_policy(tmp_path / "run/checkpoints/last.ckpt", "cpu", model=other)
    (tmp_path / "foreign.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        mobile.load_policy(tmp_path / "foreign.ckpt")


def test_a_full_disk_keeps_what_was_there(make, monkeypatch, tmp_path, capsys):
    train(make(trainer__max_steps=1))
    before = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()

    def full(*_):
        raise mobile.ckpt.DiskFull(28, "no room")

    monkeypatch.setattr(mobile.ckpt, "require_space", full)
    with pytest.raises(mobile.ckpt.DiskFull, match="newest complete one is of step 1"):
        mobile.main(make(resume="auto"))
    assert (
        "CHECKPOINT NOT SAVED" in capsys.readouterr().out
        and (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == before
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(window_size=0), "window_size is 0"),
        (dict(trainer__accumulate_grad_batches=0), "accumulate_grad_batches is 0"),
        (dict(dataset__train_split=0), "train_split"),
        (dict(label_offset=2), "expected 0 or 1"),
        (dict(dataset__action_scale="[1.0]"), "two speeds"),
        (dict(dataset__train_split=0.1), "leaves 0 to train"),
        (dict(dataset__max_text_len=5), "max_text_len is 5"),
        (dict(train_setup__lora_dropout=1), "lora_dropout"),
        (dict(dataset__feature_cache="x", dataset__future_images=True), "future_images needs the images"),
        (dict(model="/nowhere/kosmos"), "neither a directory nor reachable"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_trained(make, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mobile.main(make(**flags))


def test_another_architecture_or_missing_tensors_are_refused(make, tmp_path, kosmos_dir):
    import shutil

    from safetensors.torch import load_file, save_file

    qwen = shutil.copytree(kosmos_dir, tmp_path / "gpt")
    config = json.loads((qwen / "config.json").read_text()) | dict(model_type="gpt2", architectures=["GPT2Model"])
    (qwen / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is a gpt2; expected a kosmos-2"):
        mobile.main(make(model=qwen))
    broken = shutil.copytree(kosmos_dir, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("image_to_text_projection.latent_query")
    backbone = mobile.Backbone.open(kosmos_dir)
    backbone.config.text_config.vocab_size = mobile.REAL_VOCABULARY
    with pytest.raises(ValueError, match="do not belong together"):
        mobile.build_model(make(), backbone, mobile.Prompt(backbone.tokenizer, 64), torch.device("cpu"), torch.float32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json; expected a Kosmos-2"):
        mobile.main(make(model=tmp_path / "empty"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors.*latent_query"):
        mobile.main(make(model=broken))


def test_without_validation_episodes_only_the_last_is_kept(make, tmp_path):
    train(make(dataset__train_split=1.0, trainer__max_epochs=1))
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("*.ckpt")] == ["last.ckpt"]


def test_an_error_in_a_loader_worker_ends_the_program(make, tmp_path):
    """The workers ignore SIGTERM; a program that dies of an error must not wait for them."""
    for i in range(3):
        write_damaged(tmp_path / f"episode_2025111{i}_080000.h5")
    cfg = make(dataset__data_dir=tmp_path, num_workers=2)
    mobile.save_config(cfg, tmp_path / "run.yaml")
    out = subprocess.run(
        [sys.executable, "train_mobile_kosmos.py", "--config", str(tmp_path / "run.yaml")],
        cwd=Path(mobile.__file__).parent,
        capture_output=True,
        text=True,
        timeout=90,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert out.returncode == 1 and "dataset 'images' frame 2 cannot be read" in out.stderr


# ---- the recorder's own files ----------------------------------------------------------------------------------------


def test_the_guides_configuration_reads_the_recorders_files(shared, make, kosmos_dir, capsys):
    cfg = parse_config(
        mobile.Config,
        [
            "--config",
            str(Path(mobile.__file__).parent / "configs/mobile_kosmos.yaml"),
            "--data_dir",
            str(shared / "data/mobile"),
            "--model",
            str(kosmos_dir),
            "--check",
        ],
        mobile.ALIASES,
    )
    mobile.main(cfg)
    said = capsys.readouterr().out
    for text in (
        "8 training episodes, 144 frames; 2 validation episodes",
        "from the file 9, from its name 1, from the config 0",
        "(1, 8, 3, 28, 28)",
        "action_chunck (1, 8, 10, 2)",
    ):
        assert text in " ".join(said.split()), text
    data = mobile.load_data(cfg, 28)
    assert {e.side for e in (data.episodes[i] for i in data.validation)} == {"left", "right"}


def test_the_command_trains_on_the_recorders_files(shared, tmp_path, kosmos_dir):
    """The command line with the guide's YAML: batch 1, accumulation 8, LoRA 32/16/0.1, the four-layer LSTM. One step."""
    out = subprocess.run(
        [
            sys.executable,
            "train_mobile_kosmos.py",
            "--config",
            "configs/mobile_kosmos.yaml",
            "--data-dir",
            str(shared / "data/mobile"),
            "--model",
            str(kosmos_dir),
            "--output-dir",
            str(tmp_path / "run"),
            "--max_steps",
            "1",
            "--wandb.mode",
            "disabled",
        ],
        cwd=Path(mobile.__file__).parent,
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert out.returncode == 0, out.stderr
    assert (
        "1 x 1 ranks x 8 accumulation = 8 windows per step" in out.stdout
        and "[VAL]" in out.stdout
        and (tmp_path / "run/checkpoints/last.ckpt").is_file()
    )
