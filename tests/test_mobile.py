"""Mobile VLA: the guide's tensors value by value, a policy that hears the instruction, and the training's promises."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import make_demo
import train_mobile_kosmos as mobile
from common import UserError
from common.config import parse_config
from common.log import read_metrics

LEFT, RIGHT = (f"{make_demo.MOBILE_GOAL} {side}" for side in ("left", "right"))
ROOT = Path(mobile.__file__).parent
pytestmark = pytest.mark.usefixtures("no_plot")


@pytest.fixture(scope="session")
def mobile_root(tmp_path_factory):
    """6 episodes of 6 frames: three scenes, each once left and once right; every fifth file has no text."""
    folder = tmp_path_factory.mktemp("mobile")
    make_demo.write_mobile(folder, episodes=6, size=(24, 40), frames=6)
    return folder


@pytest.fixture(scope="session")
def kosmos_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kosmos2")
    return make_demo.write_kosmos2(folder, text=(32, 2), vision=(24, 1), image_size=28, queries=5)


@pytest.fixture
def make(tmp_path, mobile_root, kosmos_dir):
    """make(out, **flags) -> Config of a tiny run into tmp_path/out; a flag's dot is written as two underscores."""
    base = dict(model=kosmos_dir, dataset__data_dir=mobile_root, dataset__episode_pattern="*.h5", window_size=3)
    base |= dict(dataset__train_split=0.67, fwd_pred_next_n=4, batch_size=2, num_workers=0, learning_rate=1e-3)
    base |= dict(act_head__hidden_size=16, act_head__num_layers=1, train_setup__lora_r=2, trainer__max_epochs=2)
    base |= dict(trainer__accumulate_grad_batches=1, trainer__log_every_n_steps=1, label_offset=0)
    base |= dict(dataset__frame_dir=tmp_path / "frames")

    def make(out="run", **flags):
        argv = [f"--output_dir={tmp_path / out}"]
        for key, value in (base | flags).items():
            values = value if isinstance(value, list) else [value]
            argv += [f"--{key.replace('__', '.')}", *map(str, values)]
        return parse_config(mobile.Config, argv, mobile.ALIASES, accepted=mobile.ACCEPTED)

    return make


def train(cfg):
    """Run main -> (state of last.ckpt, metrics rows)."""
    mobile.main(cfg)
    return torch.load(Path(cfg.output_dir) / "checkpoints/last.ckpt", weights_only=True), read_metrics(cfg.output_dir)


def build(cfg):
    """-> (model in eval mode, Prompt, Data, Policy), LoRA's B away from zero, so that everything matters."""
    backbone = mobile.open_backbone(cfg.model)
    prompt, data = mobile.Prompt(backbone.tokenizer, cfg.dataset.max_text_len), mobile.load_data(cfg)
    model = mobile.build_model(cfg, backbone, prompt, torch.device("cpu")).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, prompt, data, mobile.Policy(model, prompt, cfg, 28, vars(data))


def write_episode(path, actions, text=None, images=None, **compression):
    """One recording by hand; images default to frames whose every pixel is the frame's number."""
    actions = np.asarray(actions, np.float32)
    images = np.stack([np.full((28, 28, 3), t, np.uint8) for t in range(len(actions))]) if images is None else images
    with h5py.File(path, "w") as f:
        f.create_dataset("images", data=images, **compression)
        f["actions"] = np.pad(actions, ((0, 0), (0, 3 - actions.shape[1])))
        if text is not None:
            f["language_instruction"] = np.array([text.encode()] if text else [], "S256")
    return path


def direct(cfg):
    """Images without a store."""
    return lambda path, frames: np.stack([mobile.picture_reader(path, cfg.dataset.colour_order, 28)(i) for i in frames])


def dataset_of(path, make, **flags):
    flags = dict(dataset__colour_order="rgb", dataset__action_scale=[1, 1], dataset__max_text_len=16) | flags
    cfg = make(**flags)
    prompt = mobile.Prompt(mobile.open_backbone(cfg.model).tokenizer, cfg.dataset.max_text_len)
    return mobile.MobileVLAH5Dataset([mobile.read_episode(path, cfg.dataset)], cfg, direct(cfg), prompt)


# ---- the guide's tensors ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offset", [0, 1])
def test_every_key_has_the_guides_shape_and_value(make, tmp_path, offset):
    """18 frames, actions = arange, image t = t everywhere: every number of the batch says where it comes from."""
    actions = np.arange(36, dtype=np.float32).reshape(18, 2) / 100
    flags = dict(window_size=8, fwd_pred_next_n=10, label_offset=offset, dataset__windows="one")
    dataset = dataset_of(write_episode(tmp_path / "e.h5", actions, "x"), make, **flags)
    item = dataset[(0, 0)]
    shapes = dict(rgb=(8, 3, 28, 28), hand_rgb=(8, 3, 28, 28), actions=(1, 18, 2), text=(1, 16), text_mask=(1, 16))
    shapes |= dict.fromkeys(("action_mask", "image_mask", "attention_mask"), (1, 18)) | dict(frames=(1, 8))
    assert {key: tuple(v.shape) for key, v in item.items() if isinstance(v, torch.Tensor)} == shapes
    assert item["lang"] == "x" and item["raw_text"] == ["x"] and item["data_source"] == "mobile_vla_action"
    batch = dataset.collater([item, dataset[(1, 0)]])
    shapes = dict.fromkeys(("rgb", "hand_rgb"), (16, 3, 28, 28)) | dict.fromkeys(("text", "text_mask"), (2, 16))
    shapes |= dict.fromkeys(("fwd_mask", "chunck_mask"), (2, 8, 10)) | dict(action_chunck=(2, 8, 10, 2))
    shapes |= dict(action=(2, 17, 2), attention_mask=(2, 8), frames=(2, 8))
    assert {key: tuple(v.shape) for key, v in batch.items() if isinstance(v, torch.Tensor)} == shapes
    np.testing.assert_array_equal(batch["action"][0], actions[:17])
    for i in range(8):
        assert (batch["rgb"][batch["frames"]][:, i] == i).all()
        for j in range(10):
            np.testing.assert_array_equal(batch["action_chunck"][1, i, j], actions[i + j + offset])
    assert all(batch[key].all() for key in ("chunck_mask", "fwd_mask", "attention_mask"))
    assert not batch["hand_rgb"].any() and [start for _, start in batch["names"]] == [0, 0]
    # and process_batch's tuple
    values = dict(zip(mobile.TUPLE, mobile.process_batch(dataset.collater([item])), strict=True))
    assert list(values)[:5] == ["rgb", "hand_rgb", "attention_mask", "language", "text_mask"] and len(values) == 19
    none = [key for key in values if "fwd_" in key or "gripper" in key or "_and_" in key or key == "rel_state"]
    none.remove("fwd_mask")
    assert [key for key, value in values.items() if value is None] == none
    np.testing.assert_array_equal(values["velocity"][0], actions[:8])
    assert values["velocity_chunck"].shape == (1, 8, 10, 2) and values["raw_text"] == ["x"]


@pytest.mark.parametrize("frames, window, future, offset", [(1, 3, 4, 0), (6, 3, 4, 1), (5, 8, 2, 0), (20, 1, 1, 1)])
def test_every_window_of_an_episode_is_there_once_and_masked(make, tmp_path, frames, window, future, offset):
    """However the episode is cut: all windows in order, true masks, images and labels of their own frames."""
    path = write_episode(tmp_path / "e.h5", np.stack([np.arange(frames), -np.arange(frames)], 1) / 100)
    flags = dict(window_size=window, fwd_pred_next_n=future, label_offset=offset, dataset__max_text_len=30)
    assert [s for _, s in dataset_of(path, make, dataset__windows="one", **flags)[(0, 0)]["names"]] == [0]
    for limit in (1, 4, 100):
        dataset = dataset_of(path, make, dataset__windows_per_sample=limit, **flags)
        items = [dataset[(0, i)] for i in range(len(dataset))]
        assert max(len(item["names"]) for item in items) <= limit
        assert all(len(item["rgb"]) <= len(item["names"]) + window - 1 for item in items), "no image twice"
        batch, (start, step, ahead) = dataset.collater(items), np.ogrid[: frames - offset, :window, :future]
        assert [s for _, s in batch["names"]] == list(range(frames - offset))
        at = start + step + ahead + offset
        np.testing.assert_array_equal(batch["chunck_mask"], at < frames)
        np.testing.assert_array_equal(batch["attention_mask"], (start + step)[..., 0] < frames)
        np.testing.assert_array_equal(batch["fwd_mask"], start + 1 + step + ahead < frames)
        labels = batch["action_chunck"][..., 0][batch["chunck_mask"]]
        np.testing.assert_allclose(labels, at[at < frames] / 100, atol=1e-6)
        seen = batch["rgb"][batch["frames"]][:, :, 0, 0, 0]
        np.testing.assert_array_equal(seen, np.minimum(start + step, frames - 1)[..., 0])


# ---- episodes --------------------------------------------------------------------------------------------------------
def test_the_text_comes_from_the_file_then_its_name_then_the_config(make, tmp_path):
    d = make().dataset
    d.data_dir, d.instruction, d.name_instructions = str(tmp_path), "anything", dict(left="go left", right="go right")
    for name, text, expected in (
        ("episode_20251118_101206_1box_hori_left_core", "to the right please", ("to the right please", "file")),
        ("episode_20251118_101207_1box_hori_left_core", None, ("go left", "name")),
        ("episode_20251118_101208_leftover", None, ("anything", "config")),
        ("episode_20251118_101209", "", ("anything", "config")),  # a dataset without a row
    ):
        episode = mobile.read_episode(write_episode(tmp_path / f"{name}.h5", np.zeros((3, 2)), text), d)
        assert (episode.instruction, episode.source) == expected
    scenarios = [mobile.read_episode(path, d).recorded[1] for path in sorted(tmp_path.glob("*.h5"))]
    assert scenarios == ["1box_hori_left_core", "1box_hori_left_core", "leftover", ""]


@pytest.mark.parametrize("order, stored", [("rgb", [9, 5, 1]), ("bgr", [1, 5, 9])])
def test_stored_bgr_becomes_rgb(tmp_path, order, stored):
    path = write_episode(tmp_path / "e.h5", np.zeros((1, 2)), None, np.uint8([[[stored]]]))
    assert mobile.picture_reader(path, order, 1)(0).tolist() == [[[9, 5, 1]]]


def episodes_of(names):
    return [mobile.Episode(n, n, 3, np.ones((3, 2), np.float32), "x", "file") for n in names]


def test_the_guides_231_episodes_split_into_184_and_47():
    found = episodes_of([f"episode_20251118_{i:06d}_{'left' if i % 3 else 'right'}" for i in range(231)])
    train, validation = mobile.split_episodes(found, 0.8, "chronological")
    assert (len(train), validation) == (184, list(range(184, 231)))
    train, validation = mobile.split_episodes(found, 0.8, "group")
    assert (len(train), len(validation)) == (184, 47) and not set(train) & set(validation)
    for group, share in (("left", 31), ("right", 16)):
        members = [i for i, e in enumerate(found) if e.recorded[1] == group]
        assert [i for i in validation if i in members] == members[-share:], "the newest of every scenario"


def test_newest_is_by_date_not_by_folder(make, tmp_path):
    for folder, day in (("a", 3), ("b", 1), ("c", 2)):
        (tmp_path / folder).mkdir()
        write_episode(tmp_path / folder / f"episode_2025111{day}_080000.h5", np.ones((3, 2)))
    data = mobile.load_data(make(dataset__data_dir=tmp_path))
    assert [e.name[0] for e in data.train] == ["b", "c"] and [e.name[0] for e in data.validation] == ["a"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("nan", "'actions' frame 0 is not finite"),
        ("images", "no dataset 'images'"),
        ("actions", r"expected numbers \(3, dims\)"),
        ("cut", "not a readable HDF5 file"),
    ],
)
def test_bad_recordings_are_named(make, tmp_path, capsys, name, message):
    write_episode(tmp_path / "episode_1.h5", np.zeros((3, 2)))
    path = write_episode(tmp_path / f"episode_2_{name}.h5", np.full((3, 2), np.nan if name == "nan" else 0))
    with h5py.File(path, "r+") as f:
        if name in f:
            del f[name]
        f.require_dataset("actions", (2 if name == "actions" else 3, 3), "f4")
    path.write_bytes(path.read_bytes()[: 900 if name == "cut" else None])
    d = make(dataset__data_dir=tmp_path).dataset
    with pytest.raises(mobile.ep.BadEpisode, match=f"episode_2_{name}.*{message}.*skip_bad_episodes"):
        mobile.load_episodes(d)
    d.skip_bad_episodes = True
    assert [e.name for e in mobile.load_episodes(d)] == ["episode_1.h5"]
    assert f"excluded  {path}" in capsys.readouterr().out
    d.episode_pattern = "x*"
    with pytest.raises(UserError, match="none of the 2 files .* matches dataset.episode_pattern 'x.'"):
        mobile.load_episodes(d)


def test_damaged_images_are_named_or_left_out_in_training_and_evaluation(make, tmp_path, mobile_root, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(mobile_root, folder)
    path = folder / "episode_20251116_080000_1box_hori_left.h5"  # the newest: would be held out
    noise = np.random.default_rng(0).integers(0, 255, (4, 28, 28, 3), dtype=np.uint8)
    write_episode(path, np.zeros((4, 2)), None, noise, chunks=(1, 28, 28, 3), compression="gzip")
    with h5py.File(path) as f:
        chunk = f["images"].id.get_chunk_info(2)
    whole = path.read_bytes()
    path.write_bytes(whole[: chunk.byte_offset] + bytes(chunk.size) + whole[chunk.byte_offset + chunk.size :])
    with pytest.raises(mobile.ep.BadEpisode, match="episode_20251116.*'images' frame 2 cannot be read.*--skip_bad"):
        mobile.main(make("stops", dataset__data_dir=folder))
    cfg = make(dataset__data_dir=folder, dataset__skip_bad_episodes=True, trainer__max_steps=1)
    state, _ = train(cfg)
    assert "excluded" in capsys.readouterr().out and len(state["meta"]["validation"]) == 2
    policy = mobile.load_policy(tmp_path / "run", "cpu")
    assert len(list(policy.open_episodes(folder))) == 6, "an evaluation of the whole folder leaves it out, too"
    assert "episode_20251116_080000_1box_hori_left.h5: its images cannot be read" in capsys.readouterr().out


def test_what_looks_wrong_in_the_data_is_said(make, tmp_path, capsys):
    for i in range(4):
        write_episode(tmp_path / f"episode_2025111{i}_080000_hori_left.h5", np.full((3, 3), 2.0), text="왼쪽")
    mobile.main(make(dataset__data_dir=tmp_path, dataset__train_split=0.75, check=True, model="no/such-model"))
    said = capsys.readouterr().out
    for text in ("cuts off 42.5% of the motion in x, 42.5% in y", "chunck_mask", "check passed"):
        assert text in said
    assert "every training episode has the same instruction" in said and "text tokens are not shown" in said
    mobile.main(make(dataset__data_dir=tmp_path, check=True))
    assert "does not know all words of 1 instruction(s), e.g. '왼쪽'" in capsys.readouterr().out


# ---- model -----------------------------------------------------------------------------------------------------------
def test_real_size_counts_of_adapters_and_head():
    from peft import LoraConfig, get_peft_model
    from transformers import Kosmos2Config, Kosmos2Model

    counts = dict(text_attention=(96, 12_582_912), text=(144, 28_311_552), all=(293, 43_089_920))
    with torch.device("meta"):
        for scope, (linears, parameters) in counts.items():
            vlm = Kosmos2Model(Kosmos2Config()).requires_grad_(False)
            assert scope != "text" or sum(p.numel() for p in vlm.parameters()) == 1_664_485_376
            vlm = get_peft_model(vlm, LoraConfig(r=32, target_modules=mobile.LORA_SCOPES[scope]))
            trained = [p.numel() for p in vlm.parameters() if p.requires_grad]
            assert (len(trained), sum(trained)) == (2 * linears, parameters)
        head = mobile.MobileVLALSTMDecoder(2048, 512, 4, 10)
        sizes = [sum(p.numel() for p in part.parameters()) for part in (head.rnn, head.mlp)]
        assert sizes == [11_550_720, 1_186_580]
        assert head(torch.zeros(2, 8, 1, 2048))[0].shape == (2, 8, 10, 2) and head(torch.zeros(2, 8, 2048))[1] is None


def test_a_model_of_an_older_transformers_gives_the_same_numbers(shared, make):
    """kosmos2_tf446: as 4.46.3 saves it, with its own processor's inputs and its own outputs."""
    folder = shared / "fixtures/kosmos2_tf446"
    io, backbone = np.load(folder / "io.npz"), mobile.open_backbone(folder / "model")
    prompt = mobile.Prompt(backbone.tokenizer, 64)
    cfg = make(train_setup__lora_enable=False)
    model = mobile.build_model(cfg, backbone, prompt, torch.device("cpu")).eval()
    rgb = torch.from_numpy(mobile.resize(io["image"], backbone.image_size).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        embeds = model.image_embeds(rgb)
        for k in range(3):
            ids, mask = prompt.tokens(str(io[f"text{k}"]))
            theirs, q = io[f"ids{k}"], model.queries
            assert ids[mask].tolist() == [theirs[0], *theirs[q + 3 :]]
            assert theirs[[1, q + 2]].tolist() == prompt.image_ids
            np.testing.assert_allclose(embeds, io[f"image_embeds{k}"], atol=1e-5)
            # an action token that is the embedding of </s>, at the place of </s>: its state is the fixture's last one
            model.action_token.copy_(model.backbone.get_input_embeddings()(ids[mask][-1]))
            state = model.encode(embeds, ids[mask][None, :-1], mask[mask][None, :-1])
            np.testing.assert_allclose(state, io[f"hidden{k}"][:, -1], atol=1e-4)


def test_files_of_other_releases_are_read(make, kosmos_dir, tmp_path):
    """transformers 5's processor_config.json, pytorch_model.bin, and a tied head in place of the embedding."""
    from transformers import AutoProcessor

    tensors = load_file(kosmos_dir / "model.safetensors")
    for head in ("model.embed_tokens.", "lm_head."):
        folder = shutil.copytree(kosmos_dir, tmp_path / head)
        (folder / "preprocessor_config.json").unlink()
        AutoProcessor.from_pretrained(kosmos_dir).save_pretrained(folder)
        assert (folder / "processor_config.json").is_file()
        (folder / "model.safetensors").unlink()
        kept = {k.replace("model.embed_tokens.", head): v for k, v in tensors.items()}
        torch.save(kept, folder / "pytorch_model.bin")
        backbone = mobile.open_backbone(folder)
        assert backbone.mean[0] == pytest.approx(0.48145466)
        model = mobile.build_model(make(), backbone, mobile.Prompt(backbone.tokenizer, 64), torch.device("cpu"))
        embedding = model.backbone.text_model.model.embed_tokens.weight
        assert torch.equal(embedding, tensors["text_model.model.embed_tokens.weight"])


def test_the_layout_is_kosmos_own_with_the_action_token_behind_the_text(make):
    """Against Kosmos2Model called the usual way: <s> <image> 5 places </image> <grounding> text </s>, ids and mask
    written by hand, and one embedding more."""
    model, prompt, *_ = build(make())
    image, (ids, mask) = torch.randint(0, 255, (1, 3, 28, 28), dtype=torch.uint8), prompt.tokens(LEFT)
    text, (begin, end) = ids[mask], prompt.image_ids
    assert prompt.tokenizer.convert_ids_to_tokens(text.tolist())[:3] == ["<s>", "<grounding>", "▁Navigate"]
    native = torch.cat([text[:1], torch.tensor([begin, *range(4, 9), end]), text[1:]])[None]
    places = torch.zeros(1, native.shape[1] + 1, dtype=torch.long)
    places[:, 2:7] = 1
    words = model.backbone.text_model.model.embed_tokens(native)
    hidden = model.backbone(
        pixel_values=(image.float() / 255 - model.mean[:, None, None]) / model.std[:, None, None],
        inputs_embeds=torch.cat([words, model.action_token[None, None]], 1),
        image_embeds_position_mask=places,
        attention_mask=torch.ones_like(places),
    ).last_hidden_state
    ours = model.encode(model.image_embeds(image), ids[None], mask[None])
    torch.testing.assert_close(ours, hidden[:, -1], rtol=1e-4, atol=1e-5)


def inputs_of(prompt, B=2, W=3, texts=(LEFT, "Navigate to the target location")):
    """Windows without a common frame."""
    torch.manual_seed(3)
    text, mask = (torch.stack(part) for part in zip(*(prompt.tokens(t) for t in texts[:B]), strict=True))
    return torch.randint(0, 255, (B * W, 3, 28, 28), dtype=torch.uint8), text, mask, torch.arange(B * W).view(B, W)


def test_huber_by_hand():
    head, labels = mobile.MobileVLALSTMDecoder(4, 4, 1, 2), (torch.zeros(1, 2, 2, 2), None)
    velocities = torch.tensor([[[[0.5, 0.0], [2.0, 0.0]], [[0.0, 0.0], [9.0, 9.0]]]])  # (1, 2, 2, 2)
    mask = torch.tensor([[[True, True], [True, False]]])
    out = head.loss((velocities, None), labels, mask)
    assert out["loss_velocity"].item() == pytest.approx((0.125 + 1.5) / 6)
    assert out["loss_gripper"] is None and out["acc_gripper"] is None
    assert head.loss((velocities, None), labels, mask, count=13)["loss_velocity"].item() == pytest.approx(1.625 / 13)
    assert head.loss((velocities, None), labels, mask & False)["loss_velocity"].item() == 0


def test_streaming_equals_the_batch_and_the_rollout(make):
    """One image at a time, over more frames than the window: the answers of predict on lists of images, of a whole
    rollout, and of what the training computes."""
    model, prompt, data, policy = build(make())
    rgb = mobile.MobileVLAH5Dataset(data.train, policy.cfg, direct(policy.cfg)).pictures(data.train[0], range(6))
    scale = policy.normalizer.unnormalize
    read = mobile.picture_reader(data.train[0].path, "bgr")
    frames = [read(t) for t in range(6)]  # of the recording's own size
    rollout = scale(policy.rollout(rgb, LEFT))
    batch = policy.predict([dict(images=frames[: t + 1], instruction=LEFT) for t in range(6)])
    assert batch.shape == (6, 4, 2) and batch.dtype == np.float32
    for t in range(6):
        np.testing.assert_allclose(policy.predict([newest(frames[t], LEFT)])[0], batch[t], atol=1e-5)
        np.testing.assert_allclose(rollout[t], batch[t], atol=1e-5)
    fresh = policy.predict([dict(images=frames[:1], instruction=RIGHT)])[0]
    np.testing.assert_allclose(policy.predict([newest(frames[0], RIGHT)])[0], fresh, atol=1e-5)  # begins anew
    policy.reset()
    np.testing.assert_allclose(policy.predict([newest(frames[0], LEFT)])[0], batch[0], atol=1e-5)
    ids, mask = (x[None] for x in prompt.tokens(LEFT))
    trained = model.forward_continuous(rgb[:3], ids, mask, torch.arange(3)[None])[0][0, -1]
    np.testing.assert_allclose(scale(trained.detach()), batch[2], atol=1e-5)


def newest(frame, text):
    return dict(images=dict(camera=frame), instruction=text)


def test_drives_of_a_batch_do_not_mix_and_a_common_frame_is_encoded_once(make, monkeypatch):
    """Other texts, lengths and images beside it, and the robot's drive that goes on meanwhile: the same answers."""
    _, _, data, policy = build(make())
    frames = list(np.random.default_rng(0).integers(0, 255, (5, 24, 40, 3), dtype=np.uint8))
    observations = [dict(images=frames[:3], instruction=LEFT), dict(images=frames[1:4], instruction=LEFT)]
    observations += [dict(images=frames[4:], instruction=RIGHT), dict(images=frames[:3], instruction=RIGHT)]
    alone = [policy.predict([o])[0] for o in observations]
    policy.predict([newest(frames[0], LEFT)])
    encoded, encode = [], policy.model.encode
    monkeypatch.setattr(policy.model, "encode", lambda x, *text: encoded.append(len(x)) or encode(x, *text))
    np.testing.assert_allclose(policy.predict(observations), alone, atol=1e-5)
    assert sum(encoded) == 8, "frames 0 to 3 under one text, and 4, 0, 1, 2 under the other"
    two = policy.predict([dict(images=frames[:2], instruction=LEFT)])
    np.testing.assert_allclose(policy.predict([newest(frames[1], LEFT)]), two, atol=1e-5)


def test_what_a_policy_takes_and_gives(make):
    """What every policy refuses is in test_policy.py; here are the images of a drive, and one image at a time."""
    policy, image = build(make())[-1], np.zeros((24, 40, 3), np.uint8)
    with pytest.raises(UserError, match="24x24, in training it was 40x24: another aspect"):
        policy.predict([dict(images=[image, image[:, :24]], instruction=LEFT)])
    with pytest.raises(UserError, match="several drives at once"):
        policy.predict([newest(image, LEFT)] * 2)
    said = policy.describe()
    assert said["instructions"] == [LEFT, RIGHT] and said["needs"]["backbone"] and said["actions"][1]["unit"] == "m/s"
    assert "send row 1" in said["first_row"] and said["skip"] == 1, "with label_offset 0, as here"
    assert build(make(label_offset=1))[-1].contract.skip == 0 and policy._states is None, "a description is no drive"


def test_only_the_adapters_dropout_is_on(make):
    model, prompt, *_ = build(make(train_setup__lora_dropout=0.5))
    inputs = inputs_of(prompt)
    model.train()
    assert not torch.equal(*(model.forward_continuous(*inputs)[0] for _ in range(2)))
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.default"):
            module.p = 0.0
    assert torch.equal(*(model.forward_continuous(*inputs)[0] for _ in range(2)))


def test_the_adapter_opens_with_peft(make, tmp_path, kosmos_dir):
    from peft import PeftModel
    from transformers import AutoModel

    model, prompt, *_ = build(make())
    model.backbone.save_pretrained(tmp_path / "adapter")
    plain = AutoModel.from_pretrained(kosmos_dir)
    plain.image_to_text_projection.x_attn.is_causal = False  # see build_model
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    inputs = inputs_of(prompt)
    expected, model.backbone = model.forward_continuous(*inputs)[0], theirs
    torch.testing.assert_close(model.forward_continuous(*inputs)[0], expected, rtol=0, atol=1e-6)


def test_an_episode_at_once_equals_its_windows_one_by_one(make):
    """The same losses and gradients, although every frame is encoded once, not W times."""
    model, prompt, data, _ = build(make())
    trained, results = [p for p in model.parameters() if p.requires_grad], []
    for limit in (1, 2, 100):
        cfg = make(dataset__windows_per_sample=limit)
        dataset = mobile.MobileVLAH5Dataset(data.train[:2], cfg, direct(cfg), prompt)
        outs = [model(dataset.collater([dataset[(0, i)]])) for i in range(len(dataset))]
        loss = sum(out["loss_sum"] for out in outs)
        gradients = torch.autograd.grad(loss, trained)
        results.append((loss.item(), torch.cat([out["sample_loss"] for out in outs]), gradients))
    for loss, each, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5) and len(each) == 12
        torch.testing.assert_close(each, results[0][1], rtol=1e-4, atol=1e-6)
        for one, other in zip(results[0][2], gradients, strict=True):
            assert (other - one).norm() <= 2e-3 * one.norm() + 1e-9  # rounding may move a ReLU over its edge


# ---- metrics ---------------------------------------------------------------------------------------------------------
def test_metrics_by_hand():
    # (T=2, N=2, 2), the last one does not exist
    target = np.array([[[1.0, 1.0], [1.0, -1.0]], [[0.0, 0.2], [9.0, 9.0]]], np.float32)
    predicted = np.array([[[1.0, 0.5], [0.0, 0.1]], [[0.0, 0.0], [0.0, 0.0]]], np.float32)
    exists = np.array([[True, True], [True, False]])
    out = mobile.measure(predicted, target, exists, [2.0, 10.0])
    assert out["mae_linear_x"] == pytest.approx(2 * 1 / 3)
    assert out["mae_linear_y"] == pytest.approx(10 * (0.5 + 1.1 + 0.2) / 3)
    assert out["rmse_linear_y"] == pytest.approx(10 * math.sqrt((0.25 + 1.21 + 0.04) / 3)), "not of a Huber loss"
    assert out["loss"] == pytest.approx((0.125 + 0.5 + 0.6 + 0.02) / 6)
    assert out["direction_accuracy"] == 0.5, "of the two steps that turn, one has the right sign"
    assert mobile.measure(predicted, target, exists & False, [1, 1]) == {}


def test_blind_predictors_by_hand(make):
    episodes = episodes_of(["1_a", "2_a"])
    episodes[0].actions = np.array([[0, 0], [1, 1], [1, 0]], np.float32)
    episodes[1].actions = np.array([[0, 0], [1, -1]], np.float32)
    table = mobile.blind_table(episodes, make(dataset__action_scale=[1, 1]))
    np.testing.assert_allclose(table, [[0, 0], [1, 0], [1, 0], [0.6, 0]], atol=1e-6)


class Answering:
    """Stands for a policy whose velocities are `answer`(images (T, 3, h, w) uint8, text) -> (T,) in [-1, 1]."""

    def __init__(self, cfg, opposites, answer):
        self.cfg, self.opposites, self.answer, self.model = cfg, opposites, answer, torch.nn.Identity()
        self.normalizer = mobile.action_normalizer(cfg)

    def rollout(self, vision_x, instruction):
        speed = np.asarray(self.answer(vision_x, instruction), np.float32)[:, None, None]
        return np.broadcast_to(speed, (len(vision_x), self.cfg.fwd_pred_next_n, 2))


def validated(make, folder, answer, most=None):
    """-> what validate says of such a policy on the first `most` recordings of the folder."""
    cfg = make(dataset__data_dir=folder, dataset__train_split=1.0)
    data = mobile.load_data(cfg)
    dataset, blind = mobile.MobileVLAH5Dataset(data.train[:most], cfg, direct(cfg)), mobile.blind_table(data.train, cfg)
    alone = SimpleNamespace(rank=0, world=1, gather=lambda rows: [rows])
    return mobile.validate(Answering(cfg, data.opposites, answer), dataset, blind, alone)


@pytest.mark.parametrize("deaf", [False, True])
def test_the_swap_test_tells_a_reader_from_a_deaf_policy(make, tmp_path, deaf):
    """Korean texts, two for each side: neither a word to exchange nor a paraphrase may be taken for the opposite."""
    for i, text in enumerate(("왼쪽으로", "왼쪽 병으로", "오른쪽으로", "오른쪽 병으로")):
        write_episode(tmp_path / f"episode_2025111{i}_080000.h5", np.full((3, 2), 1.15 if i < 2 else -1.15), text)
    side = lambda text: 0.5 if deaf or text in ("왼쪽으로", "왼쪽 병으로") else -0.5  # noqa: E731
    v = validated(make, tmp_path, lambda pictures, text: [side(text)] * len(pictures))
    assert v["swap_change"] == pytest.approx(0.0 if deaf else 1.15) and v["swap_flip"] == (0.0 if deaf else 1.0)
    assert v["val_left_direction_accuracy"] == 1.0 and v["val_right_direction_accuracy"] == (0.0 if deaf else 1.0)
    assert v["val_loss"] == v["val_loss_velocity_act"] == v["val_loss_arm_act"]
    assert ("does not listen" in mobile.validation_text(v)) == deaf


@pytest.mark.parametrize("blind", [False, True])
def test_another_episodes_pictures_tell_who_looks(make, tmp_path, blind):
    """Six recordings, of which each drives as fast as its images are bright, and errs by a little."""
    for i in range(6):
        light = 40 * i + 20
        images = np.full((4, 28, 28, 3), light, np.uint8)
        actions = np.full((4, 2), 1.15 * (light / 255 + 0.02))
        write_episode(tmp_path / f"episode_2025111{i}_080000.h5", actions, ("go", "stop")[i % 2], images)
    grey = lambda pictures, _: pictures.float().mean((1, 2, 3)) / 255 * (not blind) + 0.5 * blind  # noqa: E731
    v = validated(make, tmp_path, grey)
    if blind:
        assert v["val_swap_ratio"] == pytest.approx(1)
    else:  # the next one of the same text is 80, 80, 80, 80, -160, -160 grey levels brighter
        errors = [abs(step / 255 - 0.02) for step in (80, 80, 80, 80, -160, -160)]
        assert v["val_swap_ratio"] == pytest.approx(np.mean(errors) / 0.02, rel=0.02)
    assert ("does not look" in mobile.validation_text(v)) == blind
    v = validated(make, tmp_path, grey, most=1)  # nobody to swap with
    assert "val_swap_ratio" not in v and "does not look" not in mobile.validation_text(v)


# ---- training --------------------------------------------------------------------------------------------------------
def names_in(folder):
    return sorted(p.name.replace("-val_loss=", " ").removesuffix(".ckpt") for p in folder.glob("*.ckpt"))


def fake_validation(monkeypatch, losses):
    losses = iter(losses)
    monkeypatch.setattr(mobile, "validate", lambda *_: dict(val_loss=next(losses)))
    monkeypatch.setattr(mobile, "validation_text", lambda *_: "")


def test_the_best_three_and_the_last_are_kept_over_a_resume(make, monkeypatch, tmp_path):
    """Six epochs, stopped after the third by its number of epochs; a step of 5 samples crosses the end of an epoch. One
    whose validation is not finite is never among the best."""
    fake_validation(monkeypatch, [5.0, 1.0, math.nan, 2.0, 6.0, 3.0, 7.0, 4.0])
    folder, cut = tmp_path / "run/checkpoints", dict(batch_size=5, dataset__windows_per_sample=1)
    mobile.main(make(trainer__max_epochs=3, **cut))
    assert names_in(folder) == ["epoch_00 5.000", "epoch_01 1.000", "epoch_02 nan", "last"]
    mobile.main(make(trainer__max_epochs=6, resume="auto", **cut))
    assert names_in(folder) == ["epoch_01 1.000", "epoch_03 2.000", "epoch_05 3.000", "last"]
    last = mobile.ckpt.load_state(folder / "last.ckpt")
    assert last["epoch"] == 5 and last["position"] == 145 and not list(folder.glob(".tmp*"))
    assert next(iter(mobile.best_files(folder))).name.startswith("epoch_01")
    mobile.main(make(trainer__max_epochs=6, resume="auto", **cut))  # finished: nothing to do, no error
    mobile.main(make(trainer__max_epochs=6, resume=next(folder.glob("epoch_03*")), **cut))  # later ones are set aside
    assert names_in(folder) == ["epoch_01 1.000", "epoch_03 2.000", "epoch_05 4.000", "last"]
    assert names_in(folder / "set_aside_1") == ["epoch_05 3.000", "last"]


def test_episodes_without_a_label_are_left_out_and_said(make, tmp_path, capsys):
    for i, frames in enumerate((0, 1, 3, 3)):
        images = np.zeros((frames, 28, 28, 3), np.uint8)
        write_episode(tmp_path / f"episode_2025111{i}_080000.h5", np.zeros((frames, 2)), images=images)
    flags = dict(dataset__data_dir=tmp_path, label_offset=1, dataset__train_split=0.5)
    with pytest.raises(UserError, match="episode_20251110.*too few for label_offset 1 .*--skip_bad_episodes"):
        mobile.load_data(make(**flags))
    data = mobile.load_data(make(dataset__skip_bad_episodes=True, **flags))
    assert len(data.train) == len(data.validation) == 1 and capsys.readouterr().out.count("too few") == 2


def test_evaluate_opens_a_run(make, tmp_path, mobile_root, kosmos_dir, monkeypatch):
    """Its folder; the backbone was given as a relative path in another directory."""
    monkeypatch.chdir(kosmos_dir.parent)
    state, _ = train(make(trainer__max_epochs=1, label_offset=1, model=kosmos_dir.name))
    monkeypatch.chdir(tmp_path)
    argv = ["--data", str(mobile_root), "--output", str(tmp_path / "report"), "--device", "cpu", "--plots", "0"]
    report = evaluate.main(["--checkpoint", str(tmp_path / "run"), *argv])
    assert json.loads((tmp_path / "report/report.json").read_text())["episodes"] == sorted(state["meta"]["validation"])
    assert report["floor"]["relative"] < 1e-3
    policy = mobile.load_policy(tmp_path / "run", "cpu")
    episode = next(policy.open_episodes(mobile_root, state["meta"]["validation"][:1]))
    moved = np.abs(episode["target"]).max()
    assert episode["target"].shape == (5, 2) and moved == pytest.approx(1.15), "row t: the action after frame t, m/s"
    with pytest.raises(UserError, match="has no episode 'nothing.h5'"):
        next(policy.open_episodes(mobile_root, ["nothing.h5"]))


def test_other_scopes_train(make, tmp_path):
    everything, _ = train(make("all", train_setup__lora_scope="all", trainer__max_steps=1))
    for part in ("vision_model", "image_to_text_projection"):
        moved = [v["exp_avg"].abs().sum() for k, v in everything["moments"].items() if part in k and "lora_B" in k]
        assert moved and all(v > 0 for v in moved), f"gradients reach the {part}"
    flags = dict(dataset__windows="one", dataset__train_split=1.0, trainer__accumulate_grad_batches=4)
    none, _ = train(make("none", train_setup__lora_enable=False, trainer__max_epochs=1, **flags))
    assert not any("lora" in k for k in none["trained"]) and "action_token" in none["trained"]
    assert none["step"] == 1, "6 samples and 8 per step are an epoch"
    assert names_in(tmp_path / "none/checkpoints") == ["last"], "without validation episodes"


def test_learning_rate_by_step_and_the_default_labels():
    cfg = mobile.Config()
    warm = [1e-4 / 2.3, 2e-4 / 2.3, 1e-4, 1e-4]  # a tenth of the guide's 23 steps of an epoch
    assert [mobile.lr_at(k, 230, cfg) for k in (0, 1, 2, 500)] == pytest.approx(warm)
    assert cfg.label_offset == 1, "the first row is the motion that the newest image does not show yet"


def test_another_backbone_or_other_actions_are_another_run(make, tmp_path, kosmos_dir):
    train(make(trainer__max_steps=1))
    other = shutil.copytree(kosmos_dir, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["text_model.model.layer_norm.weight"] += 0.1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="digest"):
        mobile.main(make(resume="auto", trainer__max_steps=4, model=other))
    before, again = mobile.load_data(make()), shutil.copytree(make().dataset.data_dir, tmp_path / "again")
    with h5py.File(again / before.train[0].name, "r+") as f:
        f["actions"][:] = 1.0
    fingerprint = mobile.load_data(make(dataset__data_dir=again)).fingerprint
    assert fingerprint != before.fingerprint, "the same files, other actions"
    with pytest.raises(UserError, match="digest"):
        mobile.load_policy(tmp_path / "run/checkpoints/last.ckpt", "cpu", model=other)


def test_another_architecture_or_missing_tensors_are_refused(make, tmp_path, kosmos_dir):
    gpt = shutil.copytree(kosmos_dir, tmp_path / "gpt")
    config = json.loads((gpt / "config.json").read_text()) | dict(model_type="gpt2", architectures=["GPT2Model"])
    (gpt / "config.json").write_text(json.dumps(config))
    broken = shutil.copytree(kosmos_dir, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("image_to_text_projection.latent_query")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "empty").mkdir()
    refused = {gpt: "is a gpt2; expected a kosmos-2", broken: "lacks 1 tensors: image_to_text_projection.latent_query"}
    for folder, message in (refused | {tmp_path / "empty": "lacks a file"}).items():
        with pytest.raises(UserError, match=message):
            mobile.main(make(model=folder))
    backbone = mobile.open_backbone(kosmos_dir)
    backbone.config.text_config.vocab_size = 100
    with pytest.raises(UserError, match="do not belong together"):
        mobile.build_model(make(), backbone, mobile.Prompt(backbone.tokenizer, 64), torch.device("cpu"))


def test_the_guides_configuration_reads_the_recorders_files(shared, make, kosmos_dir, capsys, tmp_path):
    """The guide's YAML: batch 1, accumulation 8, LoRA 32/16/0.1, the four-layer LSTM. --check, then one step."""
    argv = ["--config", str(ROOT / "configs/mobile_kosmos.yaml"), "--data_dir", str(shared / "data/mobile")]
    argv += ["--model", str(kosmos_dir), "--output-dir", str(tmp_path / "run"), "--wandb.mode", "disabled"]
    argv += ["--frame_dir", str(tmp_path / "frames")]
    mobile.main(parse_config(mobile.Config, [*argv, "--check"], mobile.ALIASES))
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "8 training episodes, 144 frames; 2 validation episodes",
        "from the file 9, from its name 1, from the config 0",
        "8 with 136 windows; a micro-batch encodes up to 24 images, each once",
        "rgb (18, 3, 28, 28)",
        "action_chunck (17, 8, 10, 2)",
        "opposite ",
    ):
        assert text in said, text
    state, _ = train(parse_config(mobile.Config, [*argv, "--max_steps", "1", "--num_workers", "0"], mobile.ALIASES))
    said = capsys.readouterr().out
    assert "1 x 1 ranks x 8 accumulation = 8 samples per step" in said and "val_loss" in said and state["step"] == 1
