"""A training step of LeRobot's SmolVLA beside ours: the same export, batch, noise and flow times, each in its own
environment, in turns, on this machine. Needs LeRobot 0.4 in another Python:

    python benchmarks/lerobot_step.py outputs/demo_smolvla_sim/checkpoints/final_hf --lerobot /path/to/its/python

Prints the loss of both (they must agree), the CPU seconds of forward, backward, clipping and AdamW on the action
expert, and their ratio in every turn. Both compute in fp32 on one thread."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3  # in a turn


def ours(folder, batch):
    """-> (module, function that gives the loss)"""
    sys.path.insert(0, str(ROOT))
    import train_smolvla_sim as script

    policy = script.load_policy(folder, "cpu")
    cfg = script.Config()
    cfg.policy = policy.collate.policy
    script.choose_trained(policy.model, cfg)
    inputs = batch | dict(images=[batch["images"].flatten(0, 1)], is_pad=torch.zeros(batch["action"].shape[:2]).bool())
    return policy.model.train(), lambda: policy.model(inputs)["flow_sum"] / batch["action"].numel()


def lerobots(folder, batch):
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from safetensors.torch import load_file

    policy = SmolVLAPolicy.from_pretrained(folder).float().train()
    policy.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)  # it has rounded them to bf16
    embeddings = policy.model.vlm_with_expert.get_vlm_model().vision_model.embeddings

    def embed(pixel_values, **_):
        return embeddings.patch_embedding(pixel_values).flatten(2).mT + embeddings.position_embedding.weight

    embeddings.forward = embed  # transformers 4.57 misplaces patches in fp32, not in LeRobot's bf16
    state, action = (policy.config.input_features["observation.state"], policy.config.output_features["action"])
    inputs = {
        "observation.language.tokens": batch["tokens"],
        "observation.language.attention_mask": batch["token_mask"],
    }
    inputs |= {"observation.state": batch["state"][:, : state.shape[0]]}
    inputs |= {"action": batch["action"][..., : action.shape[0]]}
    for k, pictures in enumerate(batch["images"].unbind(1)):
        inputs[f"observation.images.camera{k + 1}"] = pictures.permute(0, 3, 1, 2).float() / 255
    return policy, lambda: policy.forward(dict(inputs), noise=batch["noise"], time=batch["time"])[0]


def serve(kind, folder, batch):
    """Make STEPS steps for every line that comes in, and say loss and CPU seconds of a step."""
    torch.set_num_threads(1)
    model, loss_of = dict(ours=ours, lerobot=lerobots)[kind](folder, torch.load(batch))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.0)  # the loss must stay the one of the export
    print(json.dumps(dict(trained=sum(p.numel() for p in trained))), flush=True)
    for _ in sys.stdin:
        begin = time.process_time()
        for _ in range(STEPS):
            loss = loss_of()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 10)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        print(json.dumps(dict(loss=loss.item(), seconds=(time.process_time() - begin) / STEPS)), flush=True)


def make_batch(folder, size, picture):
    """What both compute on: random images, states and actions of an export's sizes."""
    about = json.loads((Path(folder) / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    cameras = sum(name.startswith("observation.images") for name in about["input_features"])
    real = about["output_features"]["action"]["shape"][0]
    shape = size, about["chunk_size"], about["max_action_dim"]
    action, state = (
        torch.randn(shape, generator=generator),
        torch.randn(size, about["max_state_dim"], generator=generator),
    )
    action[..., real:], state[:, about["input_features"]["observation.state"]["shape"][0] :] = 0, 0
    return dict(
        images=torch.randint(256, (size, cameras, picture, picture, 3), generator=generator, dtype=torch.uint8),
        tokens=torch.randint(5, 20, (size, about["tokenizer_max_length"]), generator=generator),
        token_mask=torch.ones(size, about["tokenizer_max_length"], dtype=torch.bool),
        state=state,
        action=action,
        noise=torch.randn(shape, generator=generator),
        time=torch.rand(size, generator=generator),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export")
    parser.add_argument("--lerobot", default=sys.executable, help="a Python that imports lerobot")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve[0], args.export, args.serve[1])
    side = json.loads((Path(args.export) / "config.json").read_text())["resize_imgs_with_padding"][0]
    with tempfile.TemporaryDirectory() as temporary:
        path = f"{temporary}/batch.pt"
        torch.save(make_batch(args.export, args.batch_size, side), path)
        command = [__file__, args.export, "--serve"]
        children, pipes = {}, dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for kind, python in (("ours", sys.executable), ("lerobot", args.lerobot)):
            children[kind] = subprocess.Popen([python, *command, kind, path], **pipes)
        trained = {kind: answer(child)["trained"] for kind, child in children.items()}
        print(f"trained   ours {trained['ours']:,}, LeRobot {trained['lerobot']:,} parameters; batch {args.batch_size}")
        for turn in range(args.turns + 1):  # the first warms up
            said = {}
            for kind, child in children.items():
                print(turn, file=child.stdin, flush=True)
                said[kind] = answer(child)
            a, b = said["ours"], said["lerobot"]
            times = f"{a['seconds']:.3f} s, LeRobot {b['seconds']:.3f} s: {b['seconds'] / a['seconds']:.2f} x"
            print(f"turn {turn}    loss {a['loss']:.6f} and {b['loss']:.6f}; a step {times}")
        for child in children.values():
            child.stdin.close()
            child.wait()


def answer(child):
    """The next JSON line; a library's own lines before it are not ours."""
    for line in child.stdout:
        if line.startswith("{"):
            return json.loads(line)
    sys.exit(f"{child.args[0]} ended: its message says why")


if __name__ == "__main__":
    main()
