"""SmolVLA: parity with what LeRobot computed (../shared/fixtures), the training's promises, and the exported format."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import make_demo
import train_smolvla_sim as smolvla
from common.config import parse_config
from common.runlog import read_metrics
from common.stats import compute_stats as compute_stats_of


# ---- parity with LeRobot ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lerobot(shared):
    """What LeRobot 0.4.4 saved and computed: (folder of the policy, {name: array})."""
    return shared / "fixtures/smolvla_lerobot/policy", dict(np.load(shared / "fixtures/smolvla_lerobot/io.npz"))


@pytest.fixture(scope="module")
def lerobot_policy(lerobot):
    return smolvla.load_policy(lerobot[0], "cpu")


def lerobot_batch(io, policy):
    """The fixture's raw inputs through our own preprocessing."""
    observations = [
        dict(
            images=[io[f"raw.observation.images.camera{k}"][b].transpose(1, 2, 0) for k in (1, 2, 3)],
            state=io["raw.observation.state"][b],
            instruction=str(io["task"][b]),
        )
        for b in range(3)
    ]
    items = [
        o
        | dict(
            action=io["raw.action"][b],
            is_pad=np.zeros(10, bool),
            noise=io["noise"][b],
            time=float(io["time"][b]),
            name=(0, "", b),
        )
        for b, o in enumerate(observations)
    ]
    return observations, policy.collate(items)


def test_keys_and_shapes_are_lerobots(lerobot, lerobot_policy, shared):
    from safetensors.torch import load_file

    listed = {
        line.split("\t")[0]: line.split("\t")[1]
        for line in (shared / "fixtures/smolvla_lerobot/params.txt").read_text().splitlines()
    }
    file = load_file(lerobot[0] / "model.safetensors")
    ours = lerobot_policy.model.state_dict()
    assert set(ours) == set(file) == set(listed)
    assert {k: str(tuple(v.shape)) for k, v in ours.items()} == listed
    assert all(torch.equal(ours[k], v) for k, v in file.items())


def test_real_size_has_500_tensors_and_450_million_parameters():
    from transformers import SmolVLMConfig

    config = SmolVLMConfig(
        text_config=dict(
            model_type="llama",
            hidden_size=960,
            intermediate_size=2560,
            num_hidden_layers=32,
            num_attention_heads=15,
            num_key_value_heads=5,
            head_dim=64,
            vocab_size=49280,
        ),
        vision_config=dict(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            image_size=512,
            patch_size=16,
        ),
        scale_factor=4,
    )
    cfg = smolvla.Config()
    with torch.device("meta"):
        model = smolvla.SmolVLA(config, cfg.policy, 6)
    smolvla.choose_trained(model, cfg)
    assert len(model.state_dict()) == 500
    assert sum(p.numel() for p in model.parameters()) == 450_046_176
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 99_880_992


def test_a_missing_or_foreign_tensor_is_refused(lerobot, lerobot_policy):
    tensors = smolvla.read_policy_weights(lerobot[0])
    name = next(iter(tensors))
    for changed in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {"model.extra": torch.zeros(1)},
        tensors | {name: torch.zeros(3)},
    ):
        with pytest.raises(ValueError, match="Nothing was loaded"):
            smolvla.load_exact(lerobot_policy.model, changed, "test")


def test_preprocessing_equals_lerobots(lerobot, lerobot_policy):
    io = lerobot[1]
    _, batch = lerobot_batch(io, lerobot_policy)
    assert np.array_equal(batch["tokens"], io["tokens"]) and np.array_equal(batch["token_mask"], io["lang_mask"])
    np.testing.assert_allclose(batch["state"], io["state"], atol=1e-5)
    np.testing.assert_allclose(batch["action"], io["actions"], atol=1e-5)
    for k in range(3):
        ours = smolvla.resize_with_pad(torch.from_numpy(io[f"raw.observation.images.camera{k + 1}"]), 64)
        np.testing.assert_allclose(ours, io["images"][:, k], atol=1e-5)


def test_loss_and_gradients_equal_lerobots(lerobot, lerobot_policy):
    io, model = lerobot[1], lerobot_policy.model
    cfg = smolvla.Config()
    smolvla.choose_trained(model, cfg)
    _, batch = lerobot_batch(io, lerobot_policy)
    out = model(batch)
    loss = out["flow_sum"] / io["losses"].size
    loss.backward()
    assert loss.item() == pytest.approx(float(io["loss"]), abs=1e-4)
    np.testing.assert_allclose(out["sample_loss"], io["losses"].mean((1, 2)), atol=1e-4)
    assert out["real_sum"].item() == pytest.approx(io["losses"][..., :6].sum(), abs=1e-2)
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.requires_grad_(False)
    # LeRobot also lists frozen or unused tensors with gradient 0
    theirs = dict(zip(io["grad_names"].tolist(), io["grad_norms"].tolist()))
    assert set(norms) == set(theirs)
    for name, value in theirs.items():
        assert norms[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_sampled_actions_equal_lerobots(lerobot, lerobot_policy):
    io = lerobot[1]
    observations, batch = lerobot_batch(io, lerobot_policy)
    chunk = lerobot_policy.model.sample(batch, torch.from_numpy(io["noise"]))
    np.testing.assert_allclose(chunk, io["chunk"], atol=1e-4)
    images = lambda o: {f"camera{k + 1}": image for k, image in enumerate(o["images"])}
    predicted = lerobot_policy.predict([o | dict(images=images(o)) for o in observations], io["noise"])
    np.testing.assert_allclose(predicted, io["chunk_unnormalised"], atol=1e-4)


# ---- a tiny run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sim_root(tmp_path_factory):
    """5 episodes of 12 frames in the simulator's form: joint targets, metres, no instruction."""
    folder = tmp_path_factory.mktemp("sim")
    make_demo.write_insertion_sim(folder, episodes=5, size=(60, 80), max_frames=12)
    return folder


@pytest.fixture(scope="session")
def vlm_dir(tmp_path_factory):
    return make_demo.write_smolvlm2(
        tmp_path_factory.mktemp("smolvlm2"), text=(48, 3), vision=(32, 2), image_size=64, patch=8, shuffle=2
    )


@pytest.fixture
def make(tmp_path, sim_root, vlm_dir):
    """make(out, **flags) -> Config of a tiny run into tmp_path/out; a flag's dot is written as two underscores."""

    def make(out="run", **flags):
        base = dict(
            dataset__root_dir=sim_root,
            dataset__horizon=4,
            policy__chunk_size=4,
            policy__n_action_steps=4,
            policy__vlm_model_name=vlm_dir,
            policy__num_vlm_layers=2,
            policy__resize_imgs_with_padding="[32,32]",
            policy__max_state_dim=8,
            policy__max_action_dim=8,
            policy__tokenizer_max_length=20,
            policy__num_steps=3,
            training__batch_size=2,
            training__num_workers=0,
            training__steps=4,
            training__log_freq=1,
            training__save_freq=100,
            validation__num_episodes=1,
            validation__val_freq=100,
            validation__num_samples=4,
            optimizer__lr=1e-3,
            scheduler__num_warmup_steps=2,
            scheduler__num_decay_steps=8,
            output_dir=tmp_path / out,
        )
        argv = [word for k, v in (base | flags).items() for word in (f"--{k.replace('__', '.')}", str(v))]
        return parse_config(smolvla.Config, argv, smolvla.ALIASES)

    return make


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Drawing takes longer than a tiny run; test_checkpoint_files_and_their_step looks at the real picture."""
    monkeypatch.setattr(smolvla.runlog, "plot_loss", lambda *_: "")


def train(cfg):
    """Run main -> (state of the last checkpoint, metrics rows)."""
    smolvla.main(cfg)
    return torch.load(Path(cfg.output_dir) / "checkpoints/checkpoint_latest.pt", weights_only=True), read_metrics(
        cfg.output_dir
    )


def same(a, b):
    """Every tensor of two (nested) dicts is bitwise equal."""
    assert a.keys() == b.keys()
    for k in a:
        same(a[k], b[k]) if isinstance(a[k], dict) else torch.testing.assert_close(
            a[k], b[k], rtol=0, atol=0, msg=lambda m, k=k: f"{k}: {m}"
        )


def close(a, b, atol):
    """Equal up to rounding. Train with optimizer.eps 1e-2: a smaller one makes Adam's first steps +-lr whatever the gradient's size."""
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=0, atol=atol, msg=lambda m, k=k: f"{k}: {m}")


def batch_of(cfg, count=4, start=0):
    """(core model, collate, batch) with `count` samples of a config's training data."""
    data = smolvla.load_data(cfg)
    vlm_config, tokenizer = smolvla.open_vlm_files(smolvla.read_vlm_files(cfg.policy.vlm_model_name))
    core, _ = smolvla.build_model(cfg, vlm_config, data.spec, torch.device("cpu"), torch.float32)
    dataset, collate = (
        smolvla.SmolVLADataset(data, data.train, cfg),
        smolvla.Collate(tokenizer, cfg.policy, data.spec, data.stats),
    )
    return core, collate, collate([dataset[(i, i)] for i in range(start, start + count)])


# ---- run, stop, resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        dict(training__ema_decay=0.9),
        dict(
            training__num_workers=2,
            training__gradient_accumulation_steps=2,
            train="lora",
            lora_dropout=0.2,
            training__ema_decay=0.9,
        ),
    ],
    ids=["full-ema-0-workers", "lora-accumulation-2-workers"],
)
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(make, flags, monkeypatch):
    straight, _ = train(make("straight", **flags))
    step = smolvla.runlog.RunLog.step

    def kill_at_2(self, number, *args):
        step(self, number, *args)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as m:
        m.setattr(smolvla.runlog.RunLog, "step", kill_at_2)
        stopped, _ = train(make("stopped", **flags))
    assert stopped["step"] == 3  # the signal came while step 2 was logged: the step after it is finished and saved
    resumed, rows = train(make("stopped", resume="auto", **flags))
    for key in ("policy_state_dict", "model_state_dict", "ema_state_dict", "optimizer_state_dict"):
        same(resumed[key], straight[key])
    assert resumed["position"] == straight["position"] and resumed["spike_history"] == straight["spike_history"]
    assert [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3, 4]


def test_checkpoint_files_and_their_step(make, monkeypatch):
    monkeypatch.undo()
    cfg = make(training__steps=4, training__save_freq=2)
    train(cfg)
    folder = Path(cfg.output_dir) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint_latest.pt",
        "checkpoint_step_2.pt",
        "checkpoint_step_4.pt",
        "final_hf",
        "meta.json",
    ]
    two, four = (torch.load(folder / f"checkpoint_step_{n}.pt", weights_only=True) for n in (2, 4))
    assert two["step"] == 2 and four["step"] == 4
    same(torch.load(folder / "checkpoint_latest.pt", weights_only=True)["policy_state_dict"], four["policy_state_dict"])
    short, _ = train(make("short", training__steps=2))
    same(two["policy_state_dict"], short["policy_state_dict"])  # step_2 holds the weights after update 2
    assert {
        "loss.png",
        "loss_spikes.csv",
        "loss_spikes.txt",
        "validation_episodes.txt",
        "metrics.jsonl",
        "config.yaml",
        "dataset_stats.yaml",
    } <= {p.name for p in Path(cfg.output_dir).iterdir()}


def test_keep_checkpoints_deletes_the_oldest(make):
    cfg = make(training__save_freq=1, training__keep_checkpoints=2, validation__enable=False)
    train(cfg)
    assert list(smolvla.ckpt.steps_in(Path(cfg.output_dir) / "checkpoints", smolvla.STEP_FILE)) == [3, 4]


def test_resume_of_another_data_set_is_a_new_run_from_the_weights(make, tmp_path, capsys):
    """Guide 2, stage 3: --resume X --steps N --lr L with another config."""
    old, _ = train(make("sim"))
    make_demo.write_insertion_sim(tmp_path / "real", episodes=4, seed=7, size=(60, 80), max_frames=10)
    latest = tmp_path / "sim/checkpoints/checkpoint_latest.pt"
    new, rows = train(make("real_run", dataset__root_dir=tmp_path / "real", resume=latest, steps=3, lr=1e-5))
    said = capsys.readouterr().out
    assert "NEW RUN from its weights" in said and "3 steps from 0" in said and "peak lr 1e-05" in said
    assert new["step"] == 3 and [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3]
    assert max(r["train/learning_rate"] for r in rows if "train/loss" in r) == pytest.approx(1e-5)
    assert new["normalization_stats"] != old["normalization_stats"] and new["normalization_stats"]["num_episodes"] == 3
    moved = max((new["policy_state_dict"][k] - v).abs().max().item() for k, v in old["policy_state_dict"].items())
    assert 0 < moved < 4e-5  # three Adam steps of at most 1e-5 from the old weights


def test_reset_scheduler_keeps_weights_and_moments_and_warms_up_again(make, tmp_path):
    first, rows = train(make("run", scheduler__num_warmup_steps=4))
    second, after = train(
        make(
            "again",
            steps=6,
            scheduler__num_warmup_steps=4,
            resume=tmp_path / "run/checkpoints/checkpoint_latest.pt",
            reset_scheduler=True,
        )
    )
    lrs = [r["train/learning_rate"] for r in rows + after if "train/loss" in r]
    assert lrs == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 2.5e-4, 5e-4])
    plain, _ = train(
        make("plain", steps=6, scheduler__num_warmup_steps=4, resume=tmp_path / "run/checkpoints/checkpoint_latest.pt")
    )
    name = next(iter(second["optimizer_state_dict"]))
    assert (
        second["optimizer_state_dict"][name]["step"] == plain["optimizer_state_dict"][name]["step"] == 6
    )  # moments went on
    assert second["schedule_start"] == 4
    third, rest = train(
        make(
            "third", steps=7, scheduler__num_warmup_steps=4, resume=tmp_path / "again/checkpoints/checkpoint_latest.pt"
        )
    )
    assert [r["train/learning_rate"] for r in rest if "train/loss" in r] == pytest.approx(
        [7.5e-4]
    )  # the restarted schedule goes on


def test_init_from_starts_from_exactly_these_weights(make, tmp_path):
    first, _ = train(make("run", training__ema_decay=0.5, train="lora"))
    for source in ("checkpoint_latest.pt", "final_hf"):
        cfg = make(source, init_from=tmp_path / "run/checkpoints" / source, lr=0.0, steps=1)
        state, _ = train(cfg)
        same(state["policy_state_dict"], first["policy_state_dict"])
        assert state["step"] == 1


def test_a_lerobot_policy_can_be_fine_tuned(make, lerobot):
    sizes = dict(
        policy__vlm_model_name=lerobot[0].parent / "vlm",
        policy__num_vlm_layers=4,
        policy__resize_imgs_with_padding="[64,64]",
        policy__tokenizer_max_length=12,
    )
    state, _ = train(make(policy__pretrained_model_id=lerobot[0], lr=0.0, steps=1, **sizes))
    theirs = smolvla.read_policy_weights(lerobot[0])
    same(state["policy_state_dict"], theirs)
    with pytest.raises(ValueError, match="covers .* Nothing was loaded"):
        train(make("wrong", policy__pretrained_model_id=lerobot[0], **(sizes | dict(policy__num_vlm_layers=2))))


def test_a_resume_that_would_mean_something_else_is_refused(make):
    train(make(steps=2))
    for flags, message in (
        (dict(seed=1), "episodes changed"),  # the seed draws the split
        (dict(validation__num_episodes=2), "episodes changed"),
        (dict(train="lora"), "train full, now lora"),
        (dict(training__loss_dims="real"), "loss_dims all, now real"),
        (dict(normalization__mode="MIN_MAX"), "normalization MEAN_STD, now MIN_MAX"),
        (dict(policy__chunk_size=5, dataset__horizon=5), "policy.chunk_size 4, now 5"),
        (dict(steps=2), "nothing is left to do"),
        (dict(init_from="x"), "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            smolvla.main(make(**(dict(resume="auto", steps=6) | flags)))


def test_an_existing_run_is_not_overwritten(make):
    train(make(steps=1))
    with pytest.raises(FileExistsError, match="--resume auto"):
        smolvla.main(make(steps=1))
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        smolvla.main(make("other", resume="nowhere.pt"))


def test_a_random_frozen_vlm_is_refused_unless_asked_for(make):
    with pytest.raises(ValueError, match="allow_random_frozen_vlm"):
        smolvla.main(make(policy__load_vlm_weights=False))
    state, _ = train(make("asked", policy__load_vlm_weights=False, policy__allow_random_frozen_vlm=True, steps=1))
    everything, _ = train(
        make(
            "all",
            policy__load_vlm_weights=False,
            policy__train_expert_only=False,
            policy__freeze_vision_encoder=False,
            steps=1,
        )
    )
    assert len(everything["optimizer_state_dict"]) > len(state["optimizer_state_dict"])


def test_a_frozen_vlm_starts_from_its_own_file_and_stays(make, vlm_dir):
    state, _ = train(make())
    file = smolvla.read_safetensors(vlm_dir)
    prefix = "model.vlm_with_expert.vlm."
    kept = {k.removeprefix(prefix): v for k, v in state["policy_state_dict"].items() if k.startswith(prefix)}
    assert (
        "model.text_model.layers.2.mlp.up_proj.weight" in file
        and "model.text_model.layers.2.mlp.up_proj.weight" not in kept
    )  # layer 2 is not used
    same(kept, {k: v for k, v in file.items() if ".layers.2." not in k})
    assert not any(k.startswith(prefix) for k in state["optimizer_state_dict"])


# ---- equal gradients -------------------------------------------------------------------------------------------------


def test_accumulation_equals_one_big_batch(make):
    """Batches with padded tails: the loss is divided by the unpadded steps of the whole optimizer step."""
    big, rows = train(make("big", training__batch_size=4, optimizer__eps=1e-2))
    small, micro_rows = train(
        make("small", training__batch_size=1, training__gradient_accumulation_steps=4, optimizer__eps=1e-2)
    )
    close(small["policy_state_dict"], big["policy_state_dict"], 2e-6)
    for a, b in zip(rows, micro_rows):
        for key in ("train/loss", "train/action_loss", "train/temporal_loss", "train/grad_norm"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4)


def test_two_ranks_equal_one_rank_with_twice_the_batch(make, tmp_path, capfd):
    """The real launcher (gloo, CPU): same weights, losses and validation; disjoint samples, each rank its own noise."""
    flags = dict(steps=3, training__save_freq=2, validation__num_samples=7, optimizer__eps=1e-2)
    one, rows = train(make("one", training__batch_size=4, **flags))
    cfg = make("two", training__batch_size=2, **flags)
    smolvla.save_config(cfg, tmp_path / "two.yaml")
    env = dict(os.environ, OMP_NUM_THREADS="1")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "train_smolvla_sim.py",
            "--config",
            str(tmp_path / "two.yaml"),
        ],
        cwd=Path(smolvla.__file__).parent,
        env=env,
        check=True,
        capture_output=True,
        timeout=300,
    )
    two = torch.load(tmp_path / "two/checkpoints/checkpoint_latest.pt", weights_only=True)
    close(two["policy_state_dict"], one["policy_state_dict"], 2e-6)
    for a, b in zip(rows, read_metrics(tmp_path / "two")):
        assert a["step"] == b["step"]
        for key in ("train/loss", "train/grad_norm", "val/loss", "val/action_mae"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4), key
    # one rank continues what two ranks began
    resumed, _ = train(
        make("one_again", training__batch_size=4, resume=tmp_path / "two/checkpoints/checkpoint_step_2.pt", **flags)
    )
    close(resumed["policy_state_dict"], one["policy_state_dict"], 2e-6)


def test_noise_and_time_belong_to_the_position(make):
    cfg = make()
    data = smolvla.load_data(cfg)
    dataset = smolvla.SmolVLADataset(data, data.train, cfg)
    a, again, other = dataset[(0, 5)], dataset[(0, 5)], dataset[(1, 5)]
    assert np.array_equal(a["noise"], again["noise"]) and a["time"] == again["time"]
    assert not np.array_equal(a["noise"], other["noise"]) and a["time"] != other["time"]
    noise = np.stack([dataset[(p, 0)]["noise"] for p in range(300)])
    times = np.array([dataset[(p, 0)]["time"] for p in range(300)])
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert (
        0.001 <= times.min() and times.max() <= 1 and abs(times.mean() - (0.001 + 0.999 * 0.6)) < 0.05
    )  # Beta(1.5, 1) has mean 0.6


def test_weighted_shares(make, tmp_path):
    for k, name in enumerate(("a", "b")):
        make_demo.write_insertion_sim(tmp_path / "mix" / name, episodes=1 + 2 * k, seed=k, size=(60, 80), max_frames=10)
    cfg = make(dataset__root_dir=tmp_path / "mix", dataset__weights="{a: 0.3, b: 0.7}", validation__enable=False)
    data = smolvla.load_data(cfg)
    dataset = smolvla.SmolVLADataset(data, data.train, cfg)
    order = smolvla.GlobalOrder(len(dataset), cfg.seed, dataset.sample_weights())
    names = [dataset.episodes[dataset.locate(order.index(p))[0]].name for p in range(2000)]
    assert np.mean([n.startswith("a/") for n in names]) == pytest.approx(0.3, abs=0.01)
    with pytest.raises(ValueError, match="dataset.weights"):
        smolvla.SmolVLADataset(data, data.train, make(dataset__weights="{a: 0.3, c: 0.7}")).sample_weights()


# ---- loss ------------------------------------------------------------------------------------------------------------


def test_padding_changes_no_loss(make):
    core, _, batch = batch_of(make(), count=2, start=9)  # frames 9 and 10 of 12: chunks of 4 run past the end
    assert batch["is_pad"].any() and not batch["is_pad"].all(1).any()
    before = core(batch)
    batch["action"][batch["is_pad"]] += 100
    after = core(batch)
    for key in ("flow_sum", "real_sum", "temporal_sum"):
        assert after[key].item() == pytest.approx(
            before[key].item(), rel=1e-6
        )  # the actions after a padded step are padded too, and the expert is causal
    longer = {
        **batch,
        "tokens": torch.nn.functional.pad(batch["tokens"], (0, 5), value=3),
        "token_mask": torch.nn.functional.pad(batch["token_mask"], (0, 5)),
    }
    assert core(longer)["flow_sum"].item() == pytest.approx(before["flow_sum"].item(), rel=1e-5)


def test_temporal_loss_by_hand_and_its_gradient(make):
    core, _, batch = batch_of(make(), count=2)
    out = core(batch)
    t = batch["time"][:, None, None]
    x_t = t * batch["noise"] + (1 - t) * batch["action"]
    v = core.model.velocity(core.prefix(batch), x_t, batch["time"])
    clean = (x_t - t * v)[..., :6]
    assert out["temporal_sum"].item() == pytest.approx(((clean[:, 1:] - clean[:, :-1]) ** 2).sum().item(), rel=1e-5)
    out["temporal_sum"].backward()
    assert (
        core.model.action_out_proj.weight.grad[:6].abs().sum() > 0
    )  # a loss of the recorded actions alone would have none
    assert core.model.action_out_proj.weight.grad[6:].abs().sum() == 0  # padded dims are not smoothed


def test_lambda_zero_is_plain_smolvla(make):
    plain, rows = train(make("plain", training__lambda_temporal=0, steps=2))
    smooth, other = train(make("smooth", training__lambda_temporal=0.5, steps=2))
    assert all(r["train/temporal_loss"] == 0 for r in rows if "train/loss" in r) and all(
        r["train/temporal_loss"] > 0 for r in other if "train/loss" in r
    )
    name = "model.action_out_proj.weight"
    assert not torch.equal(plain["policy_state_dict"][name], smooth["policy_state_dict"][name])
    core, _, batch = batch_of(make(training__lambda_temporal=0.0), count=2)
    out = core(batch)
    assert out["sample_loss"].mean().item() == pytest.approx(
        out["flow_sum"].item() / (2 * 4 * 8), rel=1e-5
    )  # chunks of 4 steps x 8 dims, nothing padded


def test_loss_dims_real_trains_only_real_dims_and_pins_the_rest(make):
    core, _, batch = batch_of(make(training__loss_dims="real"), count=2)
    out = core(batch)
    assert out["dims"] == 6 and out["flow_sum"].item() == pytest.approx(out["real_sum"].item())
    out["flow_sum"].backward()
    assert core.model.action_out_proj.weight.grad[6:].abs().sum() == 0
    seen = []
    velocity = core.model.velocity
    core.model.velocity = lambda prefix, x, t: seen.append((x.clone(), t[0].item())) or velocity(prefix, x, t)
    core.sample(batch, batch["noise"])
    assert len(seen) == 3
    for x, t in seen:
        torch.testing.assert_close(x[..., 6:], t * batch["noise"][..., 6:])


def test_the_frozen_prefix_records_no_gradient_and_the_gradients_are_the_same(make):
    core, _, batch = batch_of(make(), count=2)
    assert not core.features(batch["images"], 3).requires_grad
    core(batch)["flow_sum"].backward()
    frozen = {n: p.grad.clone() for n, p in core.named_parameters() if p.grad is not None}
    assert all(p.grad is not None for p in core.parameters() if p.requires_grad)
    core.requires_grad_(True)
    core.zero_grad()
    core(batch)["flow_sum"].backward()
    for name, grad in frozen.items():
        torch.testing.assert_close(core.get_parameter(name).grad, grad, rtol=1e-5, atol=1e-6)


def test_every_trained_tensor_gets_a_gradient_whatever_is_trained(make):
    """DDP waits for a gradient of every parameter that requires one."""
    for flags in (
        dict(policy__train_expert_only=False),
        dict(policy__train_expert_only=False, policy__freeze_vision_encoder=False),
        dict(train="lora"),
        dict(train="lora", policy__train_expert_only=False),
        dict(policy__train_state_proj=False),
        dict(policy__attention_mode="self_attn"),
        dict(policy__num_vlm_layers=3, policy__num_expert_layers=1),
    ):
        core, _, batch = batch_of(make(**flags), count=1)
        core(batch)["flow_sum"].backward()
        assert [n for n, p in core.named_parameters() if p.requires_grad and p.grad is None] == [], flags


def test_the_state_reaches_the_actions_but_not_the_image_tokens(make):
    core, _, batch = batch_of(make(), count=2)
    valid, kv = core.prefix(batch)
    other, kv2 = core.prefix(batch | dict(state=batch["state"] + 1))
    assert torch.equal(kv[0][0][:, :, :-1], kv2[0][0][:, :, :-1]) and not torch.equal(
        kv[0][0][:, :, -1], kv2[0][0][:, :, -1]
    )


def test_overfits_one_batch(make):
    torch.manual_seed(0)
    core, _, batch = batch_of(make(), count=2)
    optimizer = torch.optim.AdamW([p for p in core.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(150):
        out = core(batch)
        out["flow_sum"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out["sample_loss"].mean().item())
    assert losses[-1] < 0.1 * losses[0]


# ---- spikes, non-finite steps, EMA, LoRA -----------------------------------------------------------------------------


def test_a_poisoned_episode_is_named_first(make, tmp_path, sim_root, capsys):
    """One frame's action x 100 in one of five episodes; the statistics are those of the clean recordings."""
    import h5py

    shutil.copytree(sim_root, tmp_path / "data")
    clean = smolvla.load_data(make(dataset__root_dir=tmp_path / "data"))
    smolvla.save_stats(tmp_path / "stats.yaml", clean.stats)
    victim = clean.train[2]
    with h5py.File(clean.episodes[victim].path, "r+") as f:
        f["action"][6] *= 100
    cfg = make(
        dataset__root_dir=tmp_path / "data",
        normalization__stats_file=tmp_path / "stats.yaml",
        steps=75,
        training__loss_spike_threshold=3,
        training__batch_size=3,
        training__log_freq=25,
    )
    smolvla.main(cfg)
    with open(Path(cfg.output_dir) / "loss_spikes.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert rows
    for row in rows:
        assert json.loads(row["episode_indices"])[0] == victim and json.loads(row["frame_indices"])[0] in (
            3,
            4,
            5,
            6,
        )  # chunks of 4 that contain frame 6
        assert row["episode_paths"].startswith(f"[{victim}] {clean.episodes[victim].path}")
        losses = json.loads(row["sample_losses"])
        assert len(losses) == 3 and losses[0] == max(losses) > 10 * sorted(losses)[0]
        assert (
            float(row["loss"]) / float(row["moving_avg"]) == pytest.approx(float(row["ratio"]), abs=0.01)
            and float(row["ratio"]) > 3
        )
    text = (Path(cfg.output_dir) / "loss_spikes.txt").read_text()
    assert "Threshold: 3.0x moving average" in text and text.count("LOSS SPIKE at Step") == len(rows)
    said = capsys.readouterr().out
    assert f"⚠️  LOSS SPIKE at step {rows[0]['step']}: " in said and f"| Episodes: [{victim}" in said
    logged = [r for r in read_metrics(cfg.output_dir) if "spike/loss" in r]
    assert [str(r["step"]) for r in logged] == [r["step"] for r in rows] and logged[0]["spike/ratio"] == pytest.approx(
        float(rows[0]["ratio"]), abs=0.01
    )


def test_spikes_begin_after_50_steps_and_compare_with_the_last_100(tmp_path):
    spikes = smolvla.Spikes(tmp_path, 2.0, [])
    assert all(spikes.check(v) is None for v in [1.0] * 48 + [50.0])  # 49 losses: too early
    spikes = smolvla.Spikes(tmp_path, 2.0, [], history=[1.0] * 99)
    assert spikes.check(3.0) == pytest.approx(1.02) and len(spikes.history) == 100
    assert spikes.check(2.0) is None  # the mean is now 1.03


def test_a_non_finite_step_changes_nothing_and_is_named(make, monkeypatch):
    item = smolvla.SmolVLADataset.__getitem__

    def poisoned(self, key):
        out = item(self, key)
        if key[0] == 3:  # position 3 is the second sample of step 2
            out["action"] = out["action"] * np.float32(np.nan)
        return out

    two, _ = train(make("two", steps=1))
    monkeypatch.setattr(smolvla.SmolVLADataset, "__getitem__", poisoned)
    cfg = make("bad", steps=2, training__save_freq=1)
    bad, rows = train(cfg)
    same(bad["policy_state_dict"], two["policy_state_dict"])
    data, cfg2 = smolvla.load_data(cfg), cfg
    dataset = smolvla.SmolVLADataset(data, data.train, cfg2)
    name = item(dataset, (3, smolvla.GlobalOrder(len(dataset), cfg.seed).index(3)))["name"]
    assert next(r["nonfinite"] for r in rows if "nonfinite" in r) == [[name[1], name[2]]]
    with open(Path(cfg.output_dir) / "loss_spikes.csv", newline="") as f:
        row = next(csv.DictReader(f))
    assert (
        row["step"] == "2"
        and row["ratio"] == "N/A"
        and json.loads(row["episode_indices"])[0] == name[0]
        and json.loads(row["frame_indices"])[0] == name[2]
    )


def test_a_killed_worker_is_explained(make, monkeypatch):
    monkeypatch.setattr(smolvla.SmolVLADataset, "__getitem__", lambda self, key: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="DataLoader worker crashed .training.num_workers is 1.*--num_workers 0"):
        train(make(training__num_workers=1))


def test_ten_non_finite_steps_stop_the_run(make, monkeypatch):
    monkeypatch.setattr(
        smolvla.SmolVLA,
        "forward",
        lambda self, batch, f=smolvla.SmolVLA.forward: {
            k: v * torch.nan if k.endswith("_sum") else v for k, v in f(self, batch).items()
        },
    )
    with pytest.raises(FloatingPointError, match="10 steps in a row"):
        smolvla.main(make(steps=30))


def test_ema_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    ema = smolvla.Ema({"p": p}, 0.5)
    p.data.fill_(3.0)
    ema.update(0)  # decay min(0.5, 1/10)
    assert ema.average["p"].item() == pytest.approx(0.1 * 1 + 0.9 * 3)
    p.data.fill_(5.0)
    ema.update(99)  # decay 0.5
    assert ema.average["p"].item() == pytest.approx(0.5 * 2.8 + 0.5 * 5)
    with ema.swapped():
        assert p.item() == pytest.approx(3.9)
    assert p.item() == 5.0
    assert smolvla.Ema({"p": p}, 0.0).average == {}


def test_ema_is_what_is_validated_and_exported(make, tmp_path):
    plain, plain_rows = train(make("plain"))
    state, rows = train(make("ema", training__ema_decay=0.9))
    same(state["model_state_dict"], plain["model_state_dict"])  # the average does not disturb the training
    name = "model.action_out_proj.weight"
    assert torch.equal(state["policy_state_dict"][name], state["ema_state_dict"][name]) and not torch.equal(
        state["policy_state_dict"][name], state["model_state_dict"][name]
    )
    assert rows[-1]["val/loss"] != plain_rows[-1]["val/loss"]
    same(smolvla.read_policy_weights(tmp_path / "ema/checkpoints/final_hf"), state["policy_state_dict"])


def test_lora_starts_as_the_base_trains_little_and_merges_exactly(make, tmp_path):
    base, _, batch = batch_of(make(), count=2)
    core, _, _ = batch_of(make(train="lora"), count=2)
    torch.testing.assert_close(core(batch)["flow_sum"], base(batch)["flow_sum"])
    trained = {n for n, p in core.named_parameters() if p.requires_grad}
    assert all(
        ".lora_" in n
        or n.split(".")[1]
        in ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")
        for n in trained
    )
    assert sum(".lora_A" in n for n in trained) == 2 * 7  # seven projections in each of two expert layers
    cfg = make("lora", train="lora", lora_rank=4, lora_alpha=8)
    state, _ = train(cfg)
    core, _, _ = batch_of(make(train="lora", lora_rank=4, lora_alpha=8), count=2)
    core.load_state_dict(state["model_state_dict"])
    assert core.state_dict()["model.vlm_with_expert.lm_expert.layers.0.mlp.up_proj.lora_B"].abs().max() > 0
    merged = smolvla.load_policy(tmp_path / "lora/checkpoints/checkpoint_latest.pt", "cpu").model
    assert core.eval()(batch)["flow_sum"].item() == pytest.approx(merged(batch)["flow_sum"].item(), rel=1e-4)


# ---- export, load, predict -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sim_root, vlm_dir):
    """(output_dir, config) of a finished short run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    argv = f"""--dataset.root_dir {sim_root} --dataset.horizon 4 --policy.chunk_size 4 --policy.n_action_steps 4 --policy.vlm_model_name {vlm_dir} --policy.num_vlm_layers 2
        --policy.resize_imgs_with_padding [64,64] --policy.max_state_dim 8 --policy.max_action_dim 8 --training.batch_size 4 --training.num_workers 0 --training.steps 30 --lr 2e-3
        --scheduler.num_warmup_steps 2 --validation.num_episodes 2 --output_dir {out}"""
    cfg = parse_config(smolvla.Config, argv.split(), smolvla.ALIASES)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(smolvla.runlog, "plot_loss", lambda *_: "")
        smolvla.main(cfg)
    return out, cfg


def test_final_hf_has_lerobots_layout(trained, lerobot):
    """The same files, fields and processor steps as LeRobot 0.4.4 wrote; fields that other versions do not know are left out."""
    ours, theirs = trained[0] / "checkpoints/final_hf", lerobot[0]
    assert {p.name for p in theirs.iterdir()} | {"policy.json", "vlm"} == {p.name for p in ours.iterdir()}
    read = lambda folder, name: json.loads((folder / name).read_text())
    a, b = read(ours, "config.json"), read(theirs, "config.json")
    assert set(a) == set(b) - {"use_peft", "rtc_config", "compile_model", "compile_mode"}
    assert {k: type(v) for k, v in a.items() if v is not None} == {
        k: type(b[k]) if k != "optimizer_grad_clip_norm" else float for k, v in a.items() if v is not None
    }
    assert set(a["input_features"]) == set(b["input_features"]) and a["input_features"][
        "observation.images.camera1"
    ] == {"type": "VISUAL", "shape": [3, 60, 80]}
    assert a["output_features"] == b["output_features"] and a["load_vlm_weights"] is False

    def shape(processor):
        """names, files and settings of the steps, without values that belong to the data and sizes"""
        return [(s["registry_name"], s.get("state_file"), sorted(s["config"])) for s in processor["steps"]]

    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        p, q = read(ours, name), read(theirs, name)
        assert p["name"] == q["name"] and shape(p) == shape(q)
    from safetensors.torch import load_file

    for name in (smolvla.NORMALIZER, smolvla.UNNORMALIZER):
        p, q = load_file(ours / name), load_file(theirs / name)
        assert set(q) <= set(p) and all(p[k].shape == q[k].shape and p[k].dtype == torch.float32 for k in q)
        assert set(p) - set(q) == {f"{k}.{s}" for k in ("action", "observation.state") for s in ("q01", "q99")}


def test_checkpoint_final_hf_and_the_trained_model_predict_the_same(trained, sim_root):
    out, cfg = trained
    policies = [
        smolvla.load_policy(p, "cpu")
        for p in (out / "checkpoints/checkpoint_latest.pt", out / "checkpoints/final_hf", out)
    ]
    episode = next(iter(policies[0].open_episodes(sim_root)))
    observations = [episode["sample"](t) for t in (0, 5, 11)]
    first = policies[0].predict(observations)
    assert first.shape == (3, 4, 6) and first.dtype == np.float32
    for policy in policies[1:]:
        np.testing.assert_array_equal(policy.predict(observations), first)
    one_by_one = np.concatenate([policies[0].predict([o]) for o in observations])
    np.testing.assert_allclose(one_by_one, first, atol=1e-5)


def test_final_hf_without_our_files_predicts_the_same(trained, sim_root, tmp_path):
    """LeRobot's own files say everything that sampling needs."""
    folder = tmp_path / "final_hf"
    shutil.copytree(trained[0] / "checkpoints/final_hf", folder)
    ours = smolvla.load_policy(folder, "cpu")
    observation = next(iter(ours.open_episodes(sim_root)))["sample"](3)
    (folder / "policy.json").unlink()
    theirs = smolvla.load_policy(folder, "cpu")
    np.testing.assert_allclose(
        theirs.predict([observation | dict(instruction=trained[1].dataset.task_instruction)]),
        ours.predict([observation]),
        atol=1e-5,
    )
    (folder / smolvla.NORMALIZER).unlink()
    with pytest.raises(ValueError, match="--init_from"):
        smolvla.load_policy(folder, "cpu")


def test_predict_depends_on_images_state_and_instruction_and_refuses_what_is_missing(trained, sim_root):
    policy = smolvla.load_policy(trained[0], "cpu")
    observation = next(iter(policy.open_episodes(sim_root)))["sample"](3)
    base = policy.predict([observation])
    images = observation["images"]
    for changed in (
        observation | dict(instruction="stop"),
        observation | dict(state=observation["state"] + 1),
        observation | dict(images=images | dict(camera2=255 - images["camera2"])),
    ):
        assert np.abs(policy.predict([changed]) - base).max() > 1e-6
    floats = observation | dict(images={k: v.astype(np.float32) / 255 for k, v in images.items()})
    np.testing.assert_allclose(policy.predict([floats]), base, atol=1e-5)
    with pytest.raises(ValueError, match="camera2 = tool_camera"):
        policy.predict([observation | dict(images={k: v for k, v in images.items() if k != "camera2"})])
    with pytest.raises(ValueError, match=r"shape \(3,\), the policy needs \(6,\)"):
        policy.predict([observation | dict(state=observation["state"][:3])])


def test_evaluate_reports_on_the_held_out_episodes(trained, sim_root, tmp_path, capsys):
    import evaluate

    report = evaluate.main(
        [
            "--checkpoint",
            str(trained[0] / "checkpoints/checkpoint_latest.pt"),
            "--data",
            str(sim_root),
            "--output",
            str(tmp_path / "report"),
            "--stride",
            "4",
        ]
    )
    assert "2 validation episodes of the checkpoint" in capsys.readouterr().out
    assert (
        list(report["policy"]["per_dim"]) == [f"q{i}" for i in range(1, 7)]
        and (tmp_path / "report/summary.png").is_file()
    )
    data = smolvla.load_data(trained[1])
    written = json.loads((tmp_path / "report/report.json").read_text())
    assert written["episodes"] == [data.episodes[i].name for i in data.validation] and written["units"] == {
        f"q{i}": "rad" for i in range(1, 7)
    }
    # holding still is staying at the measured joints
    episode = next(iter(smolvla.load_policy(trained[0], "cpu").open_episodes(sim_root)))
    assert np.array_equal(episode["hold"], data.episodes[0].qpos) and np.array_equal(
        episode["target"], data.episodes[0].action
    )


def test_validation_loss_on_the_whole_part_by_hand(trained):
    """val/* are sums over unpadded steps, not means of batch means."""
    out, cfg = trained
    last = [r for r in read_metrics(out) if "val/loss" in r][-1]
    policy, data = smolvla.load_policy(out, "cpu"), smolvla.load_data(cfg)
    dataset = smolvla.SmolVLADataset(data, data.validation, cfg)
    flow = real = steps = error = 0.0
    for i in range(len(dataset)):
        item = dataset[(i, i)]
        result = policy.model(policy.collate([item]))
        n = int((~item["is_pad"]).sum())
        flow, real, steps = flow + result["flow_sum"].item() / 8, real + result["real_sum"].item() / 6, steps + n
        error += np.abs(policy.decode(policy.collate.inputs([item]))[0] - item["action"])[:n].sum()
    assert last["val/loss"] - last["val/temporal_loss"] == pytest.approx(flow / steps, rel=1e-4) and last[
        "val/action_loss"
    ] == pytest.approx(real / steps, rel=1e-4)
    assert last["val/action_mae"] == pytest.approx(error / steps / 6, rel=1e-4)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_validation_episodes_are_drawn_listed_and_kept_out_of_the_statistics(trained):
    out, cfg = trained
    data = smolvla.load_data(cfg)
    assert (
        data.validation == sorted(random.Random(1000).sample(range(5), 2))
        and set(data.train) | set(data.validation) == set(range(5))
        and len(data.train) == 3
    )
    text = (out / "validation_episodes.txt").read_text()
    assert f"Validation episode indices: {data.validation}" in text and all(
        f"  [{i}] {data.episodes[i].path}" in text for i in data.validation
    )
    np.testing.assert_allclose(
        data.stats["action"]["mean"],
        np.concatenate([data.episodes[i].action for i in data.train]).astype(np.float64).mean(0),
    )


def test_statistics_that_saw_validation_episodes_or_lack_are_refused(make, tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset_stats_sim.yaml not found"):
        smolvla.load_data(make(normalization__stats_file=tmp_path / "dataset_stats_sim.yaml"))
    smolvla.save_stats(tmp_path / "all.yaml", smolvla.load_data(make(validation__enable=False)).stats)
    with pytest.raises(ValueError, match="this run validates on"):
        smolvla.load_data(make(normalization__stats_file=tmp_path / "all.yaml"))


def test_cameras_come_in_the_order_of_the_config(make):
    data = smolvla.load_data(make(dataset__cameras="top_camera,camera1"))
    assert data.spec.cameras == ["top_camera", "side_camera"]
    plain = smolvla.load_data(make())
    assert plain.spec.cameras == ["side_camera", "tool_camera", "top_camera"]
    a, b = (smolvla.SmolVLADataset(d, d.train, make())[(0, 3)]["images"] for d in (data, plain))
    assert np.array_equal(a[0], b[2]) and np.array_equal(a[1], b[0]) and len(a) == 2
    for wrong in ("front_camera", "top_camera,top_camera", "camera4"):
        with pytest.raises(ValueError, match="dataset.cameras"):
            smolvla.load_data(make(dataset__cameras=f"[{wrong}]"))


def test_what_the_frame_sees_does_not_depend_on_later_frames(make, tmp_path, sim_root):
    import h5py

    shutil.copytree(sim_root, tmp_path / "data")
    cfg = make(dataset__root_dir=tmp_path / "data", validation__enable=False)
    before = smolvla.load_data(cfg)
    first = smolvla.SmolVLADataset(before, [0], cfg)[(0, 5)]
    with h5py.File(before.episodes[0].path, "r+") as f:
        for camera in before.spec.cameras:
            f[f"observations/images/{camera}"][6] = f[f"observations/images/{camera}"][0]
        f["observations/ee_pose"][6:] = 0
    after = smolvla.load_data(cfg)
    second = smolvla.SmolVLADataset(after, [0], cfg)[(0, 5)]
    assert all(np.array_equal(a, b) for a, b in zip(first["images"], second["images"])) and np.array_equal(
        first["state"], second["state"]
    )


@pytest.mark.parametrize(
    "mode, low, high",
    [("MEAN_STD", -2.0, 2.0), ("MIN_MAX", -1.0, 1.0), ("QUANTILES", -1.25, 1.25), ("IDENTITY", 0.0, 10.0)],
)
def test_normalisation_modes_by_hand(mode, low, high):
    entry = dict(mean=[5.0, 7.0], std=[2.5, 0.0], min=[0.0, 7.0], max=[10.0, 7.0], q01=[1.0, 7.0], q99=[9.0, 7.0])
    n = smolvla.Normalizer(entry, mode)
    x = np.array([[0.0, 7.0], [10.0, 7.0]])
    y = n.normalize(x)
    np.testing.assert_allclose(y[:, 0], [low, high])
    np.testing.assert_allclose(y[:, 1], 7.0 if mode == "IDENTITY" else 0.0)  # a constant dimension
    np.testing.assert_allclose(n.unnormalize(y), x)
    if mode != "IDENTITY":
        np.testing.assert_allclose(
            n.unnormalize(np.array([[low, 3.0]])), [[0.0, 7.0]]
        )  # comes back whatever was sampled
        with pytest.raises(ValueError, match="lack"):
            smolvla.Normalizer({"mask": [True]}, mode)


def test_a_rare_jump_survives_quantiles():
    n = smolvla.Normalizer(dict(q01=[0.0], q99=[0.0], min=[0.0], max=[4.0]), "QUANTILES")
    np.testing.assert_allclose(n.normalize(np.array([[0.0], [4.0]])), [[-1.0], [1.0]])


@hypothesis.given(
    x=st.lists(st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 2), min_size=2, max_size=30),
    mode=st.sampled_from(["MEAN_STD", "MIN_MAX", "QUANTILES", "IDENTITY"]),
)
def test_normalisation_comes_back(x, mode):
    x = np.array(x, np.float32)
    n = smolvla.Normalizer(compute_stats_of({"action": [x]})["action"], mode)
    np.testing.assert_allclose(n.unnormalize(n.normalize(x)), x, rtol=1e-4, atol=1e-3)


@hypothesis.given(h=st.integers(20, 900), w=st.integers(20, 900), side=st.sampled_from([64, 512]))
@hypothesis.settings(max_examples=25)
def test_resize_keeps_the_aspect_and_pads_left_and_top(h, w, side):
    out = smolvla.resize_with_pad(torch.full((1, 3, h, w), 0.75), side)
    ch, cw = smolvla.content_size(h, w, side)
    assert out.shape == (1, 3, side, side) and max(ch, cw) == side and abs(ch / cw - h / w) <= h / w * 2 / min(ch, cw)
    torch.testing.assert_close(out[0, :, side - ch :, side - cw :], torch.full((3, ch, cw), 0.5))
    assert (out[0, :, : side - ch] == -1).all() and (out[0, :, :, : side - cw] == -1).all()


def test_feature_cache_changes_nothing_but_the_reading(make, tmp_path, monkeypatch):
    plain, rows = train(make("plain"))
    cached, cached_rows = train(make("cached", training__feature_cache=tmp_path / "cache"))
    close(cached["policy_state_dict"], plain["policy_state_dict"], 1e-5)
    assert cached_rows[-1]["val/loss"] == pytest.approx(rows[-1]["val/loss"], rel=1e-4)
    monkeypatch.setattr(smolvla.SmolVLA, "features", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(
        smolvla.ep.ImageReader,
        "read",
        lambda *a, read=smolvla.ep.ImageReader.read, **k: (
            read(*a, **k) if not k else pytest.fail("an image was decoded")
        ),
    )
    again, _ = train(make("again", training__feature_cache=tmp_path / "cache", training__num_workers=1))
    same(again["policy_state_dict"], cached["policy_state_dict"])
    with pytest.raises(ValueError, match="feature_cache"):
        smolvla.main(make("x", training__feature_cache=tmp_path / "cache", policy__train_expert_only=False))


def test_augmentation_is_drawn_by_position_and_only_in_training(make):
    cfg = make(dataset__augment=True)
    data = smolvla.load_data(cfg)
    on, off = (
        smolvla.SmolVLADataset(data, data.train, cfg, cfg.dataset.augment),
        smolvla.SmolVLADataset(data, data.train, cfg),
    )
    a, again, other, plain = (
        on[(0, 3)]["images"][0],
        on[(0, 3)]["images"][0],
        on[(1, 3)]["images"][0],
        off[(0, 3)]["images"][0],
    )
    assert (
        np.array_equal(a, again)
        and not np.array_equal(a, other)
        and not np.array_equal(a, plain)
        and a.dtype == np.uint8
        and a.shape == plain.shape
    )
    still = smolvla.augment_image(
        plain,
        make(**{f"dataset__augment_{k}": 0 for k in ("brightness", "contrast", "saturation", "hue", "noise")}).dataset,
        np.random.default_rng(0),
    )
    assert np.abs(still.astype(int) - plain).mean() < 2  # rounding of HSV


def test_check_prints_the_batch_and_needs_no_weights(make, capsys, vlm_dir, tmp_path):
    smolvla.main(make(check=True))
    said = capsys.readouterr().out
    for words in (
        "4 training episodes, 48 frames; 1 validation episodes",
        "side_camera -> camera1 60x80",
        "joint targets, 6 dims",
        "tokens         (2, 20)",
        "'Insert needle into eye trocar in simulation\\n",
        "check passed",
    ):
        assert words in said, words
    smolvla.main(make(check=True, policy__vlm_model_name=tmp_path / "nowhere"))
    assert "tokens are not shown" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(training__use_amp=True), "use_bfloat16"),
        (dict(dataset__horizon=5), "policy.chunk_size is 4"),
        (dict(training__batch_size=0), "training.batch_size is 0: expected 1 or more"),
        (dict(policy__n_action_steps=9), "expected 1..4"),
        (dict(validation__num_episodes=5), "hold out fewer"),
        (dict(reset_scheduler=True), "--resume CHECKPOINT"),
        (dict(policy__max_action_dim=5), "policy.max_action_dim is 5"),
        (dict(dataset__use_ee_pose=False), "the state is made of nothing"),
        (dict(policy__num_vlm_layers=9), "has 3"),
        (dict(policy__resize_imgs_with_padding="[48,40]"), "expected a square in multiples of 16 .* up to 64"),
        (dict(policy__num_vlm_layers=3, policy__num_expert_layers=2), "must divide"),
    ],
)
def test_wrong_values_are_named(make, flags, message):
    with pytest.raises(ValueError, match=message):
        smolvla.main(make(**flags))


def test_learning_rate_by_hand(make):
    cfg = make(
        scheduler__num_warmup_steps=4,
        scheduler__num_decay_steps=12,
        optimizer__lr=2e-3,
        scheduler__peak_lr=1e-3,
        scheduler__decay_lr=1e-4,
    )
    lr = lambda k: smolvla.lr_at(k, cfg)
    assert [lr(0), lr(3), lr(4), lr(8), lr(12), lr(10**6)] == pytest.approx(
        [5e-4, 2e-3, 2e-3, (2e-3 + 2e-4) / 2, 2e-4, 2e-4]
    )


# ---- the guide -------------------------------------------------------------------------------------------------------

GUIDE = """
dataset: {root_dir: ROOT, horizon: 50, task_instruction: "Insert needle into eye trocar in simulation", augment: false}
training: {steps: 30000, batch_size: 16, gradient_accumulation_steps: 1, lambda_temporal: 0.05}
validation: {enable: true, num_episodes: 20, val_freq: 2000}
optimizer: {lr: 0.0001, betas: [0.9, 0.95]}
scheduler: {num_warmup_steps: 1000, num_decay_steps: 30000}
wandb: {enable: true, project: "smolvla-meca500-insertion-sim"}
"""


def test_the_guides_yaml_is_the_shipped_one(tmp_path):
    (tmp_path / "guide.yaml").write_text(GUIDE)
    guide = parse_config(smolvla.Config, ["--config", str(tmp_path / "guide.yaml")], smolvla.ALIASES)
    assert guide.wandb.project == "smolvla-meca500-insertion-sim" and guide.optimizer.betas == [0.9, 0.95]
    shipped = parse_config(
        smolvla.Config, ["--config", str(Path(smolvla.__file__).parent / "configs/smolvla_sim.yaml")], smolvla.ALIASES
    )
    for group in ("training", "validation", "optimizer", "scheduler"):
        ours, theirs = vars(getattr(shipped, group)), vars(getattr(guide, group))
        assert {k: v for k, v in ours.items() if theirs[k] != v and k != "lambda_temporal"} == {}, group
    assert (
        shipped.output_dir == "outputs/train/smolvla_needle_insertion_sim"
        and shipped.normalization.stats_file == "dataset_stats_sim.yaml"
    )


def test_compute_stats_and_the_training_hold_the_same_episodes_out(make, tmp_path):
    """bash shells/compute_dataset_stats_sim.sh, then a training on what it wrote."""
    import compute_stats

    cfg = make(validation__num_episodes=2)
    smolvla.save_config(cfg, tmp_path / "train.yaml")
    compute_stats.main(
        parse_config(
            compute_stats.Config,
            ["--config", str(tmp_path / "train.yaml"), "--output", str(tmp_path / "stats.yaml")],
            partial=True,
        )
    )
    read = smolvla.load_data(make(validation__num_episodes=2, normalization__stats_file=tmp_path / "stats.yaml"))
    assert read.stats == smolvla.load_data(cfg).stats and len(read.stats["excluded_episodes"]) == 2


def test_the_guides_commands_on_the_simulators_recordings(shared, vlm_dir, tmp_path, capsys):
    """train, resume, resume --reset_scheduler on six real episodes, with a tiny backbone."""
    (tmp_path / "guide.yaml").write_text(
        GUIDE.replace("ROOT", str(shared / "data/insertion_sim")).replace(
            "enable: true, project", "enable: false, project"
        )
    )
    base = [
        "--config",
        str(tmp_path / "guide.yaml"),
        "--policy.vlm_model_name",
        str(vlm_dir),
        "--policy.num_vlm_layers",
        "2",
        "--policy.resize_imgs_with_padding",
        "[64,64]",
        "--batch-size",
        "2",
        "--num_workers",
        "0",
        "--log_freq",
        "1",
        "--validation.num_episodes",
        "2",
        "--num_samples",
        "4",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    run = lambda *extra: train(parse_config(smolvla.Config, [*base, *extra], smolvla.ALIASES))
    run("--steps", "2")
    assert "[100.0%] Step 2/2 | Loss: " in (said := capsys.readouterr().out) and "[VAL] Step 2 | Loss: " in said
    run("--steps", "3", "--resume", str(tmp_path / "run/checkpoints/checkpoint_step_2.pt"))
    state, rows = run(
        "--steps", "4", "--resume", str(tmp_path / "run/checkpoints/checkpoint_step_3.pt"), "--reset_scheduler"
    )
    lrs = [r["train/learning_rate"] for r in rows if "train/loss" in r]
    assert state["step"] == 4 and lrs == pytest.approx([1e-7, 2e-7, 3e-7, 1e-7])
    assert [name for name, _ in smolvla.load_policy(tmp_path / "run", "cpu").action_names()] == [
        f"q{i}" for i in range(1, 7)
    ]


def test_bf16_autocast_with_frozen_bf16_weights_is_close_to_fp32(make, monkeypatch):
    """The path of a GPU, on the CPU: fp32 trained weights, bf16 frozen ones, bf16 autocast."""
    for flags in (dict(), dict(train="lora"), dict(policy__train_expert_only=False)):
        core, _, batch = batch_of(make(**flags), count=4)
        cfg = make(**flags)
        data = smolvla.load_data(cfg)
        vlm_config, tokenizer = smolvla.open_vlm_files(smolvla.read_vlm_files(cfg.policy.vlm_model_name))
        half, _ = smolvla.build_model(cfg, vlm_config, data.spec, torch.device("cpu"), torch.bfloat16)
        assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32} and {
            p.dtype for p in half.parameters() if not p.requires_grad
        } == {torch.bfloat16}
        with torch.autocast("cpu", torch.bfloat16):
            out = half(batch)
        out["flow_sum"].backward()
        assert out["flow_sum"].dtype == torch.float32 and out["flow_sum"].item() == pytest.approx(
            core(batch)["flow_sum"].item(), rel=0.03
        )
        assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)
        policy = smolvla.Policy(
            half.eval(), smolvla.Collate(tokenizer, cfg.policy, data.spec, data.stats), torch.bfloat16
        )
        exact = smolvla.Policy(core.eval(), policy.collate)
        np.testing.assert_allclose(policy.decode(batch), exact.decode(batch), atol=0.05)


def test_compiled_forward_gives_the_same_loss_and_gradients(make):
    """use_torch_compile calls core.compile(); here without the code generator, which takes minutes on a CPU."""
    core, _, batch = batch_of(make(), count=2)
    plain = core(batch)
    plain["flow_sum"].backward()
    grads = {n: p.grad.clone() for n, p in core.named_parameters() if p.grad is not None}
    core.zero_grad()
    core.compile(backend="aot_eager")
    out = core(batch)
    out["flow_sum"].backward()
    assert out["flow_sum"].item() == pytest.approx(plain["flow_sum"].item(), rel=1e-5)
    close({n: p.grad for n, p in core.named_parameters() if p.grad is not None}, grads, 1e-4)
    assert set(core.state_dict()) == set(batch_of(make())[0].state_dict())  # the names in a checkpoint stay
