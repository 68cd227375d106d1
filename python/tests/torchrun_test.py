"""Expert parallelism under torchrun: the same bytes on 1, 2 and 4 ranks."""

from __future__ import annotations

import os
import subprocess
import sys

TOKENS, TOPK, EXPERTS, HIDDEN, INNER = 24, 2, 6, 16, 8


def main() -> None:
    """One step of experts under a style, then of a layer; rank 0 prints a digest of all outputs and gradients."""
    import hashlib

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    import expar.torch as ep

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    mine = slice(*(TOKENS * r // mesh.size() for r in (mesh.get_rank(), mesh.get_rank() + 1)))
    g = torch.Generator().manual_seed(1)
    x, dout = (t[mine] for t in torch.randn(2, TOKENS, HIDDEN, generator=g))
    ids = torch.randint(EXPERTS, (TOKENS, TOPK), generator=g)[mine].flatten()

    torch.manual_seed(1)
    experts = parallelize_module(ep.GroupedExperts(HIDDEN, INNER, EXPERTS), mesh, ep.ExpertParallel())
    order = ids.argsort(stable=True)
    rows = x.repeat_interleave(TOPK, 0)[order].requires_grad_()
    out = experts(rows, ids.bincount(minlength=EXPERTS))
    out.backward(dout.repeat_interleave(TOPK, 0)[order])
    back = order.argsort()
    parts = [out.detach()[back], rows.grad[back], *(w.grad.to_local() for w in experts.parameters())]

    layer = ep.MoELayer(HIDDEN, INNER, EXPERTS, TOPK, context=ep.context(mesh), balance=0.1)
    x = x.clone().requires_grad_()
    out = layer(x)
    ((out * dout).sum() + layer.aux_loss / mesh.size()).backward()
    parts += [out.detach(), x.grad, layer.experts.up.grad, layer.experts.down.grad]

    digest = hashlib.sha256()
    for part in parts:
        gathered = [None] * mesh.size()
        dist.all_gather_object(gathered, part)
        digest.update(torch.cat(gathered).numpy().tobytes())
    if dist.get_rank() == 0:
        print("digest", digest.hexdigest(), flush=True)
    # DTensors keep the process group, and gloo's threads abort an interpreter that ends while they let go of a tensor.
    os._exit(0)


def digest_on(ranks):
    torchrun = os.path.join(os.path.dirname(sys.executable), "torchrun")
    done = subprocess.run(
        [torchrun, "--standalone", f"--nproc-per-node={ranks}", __file__], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("digest "))
    return line


def test_expert_parallelism_gives_the_same_bytes_on_1_2_and_4_ranks():
    assert digest_on(1) == digest_on(2) == digest_on(4)


if __name__ == "__main__":
    main()
