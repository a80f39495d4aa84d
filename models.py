"""Builds the networks (Sec. 4, Table 2) and sets up their training: optimizer, bf16, torch.compile, torchrun.
Every network is a Classifier, from pixels in [0, 1] to logits."""
import collections
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common import UserError, can_compile, process_count
from runs import load

CHECKPOINT_KEYS = ("model", "arch", "head", "classes", "args", "fingerprint", "A_classes", "epoch")


class PreActBlock(nn.Module):
    """Pre-activation residual block (He et al. 2016): (N, C_in, H, W) -> (N, C_out, H / stride, W / stride).
    `always_project`: put a 1x1 convolution into the shortcut even where the shapes agree."""

    def __init__(self, c_in, c_out, stride, always_project=False):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        needs_convolution = always_project or c_in != c_out or stride != 1
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if needs_convolution else None

    def forward(self, x):
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True)) + shortcut


def preactresnet(channels, widths, blocks, stem=None, always_project=False):
    """A convolution to `stem` (or widths[0]) channels, then `blocks` PreActBlocks of each width, then batch
    norm, ReLU and pooling. From the second width on, the first block of each width halves the side."""
    c_in = stem or widths[0]
    layers = [nn.Conv2d(channels, c_in, 3, 1, 1, bias=False)]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(PreActBlock(c_in, width, 2 if stage > 0 and block == 0 else 1, always_project))
            c_in = width
    return nn.Sequential(*layers, nn.BatchNorm2d(c_in), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten())


class Classifier(nn.Module):
    """A network from pixels in [0, 1], (N, C, H, W), to logits (N, n_classes). `mean` and `std` normalise
    each channel. `frozen`: the features, batch-norm statistics included, are not trained (Sec. 4.3)."""

    def __init__(self, features, head, mean, std):
        super().__init__()
        self.features, self.head, self.frozen = features, head, False
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x):
        return self.head(self.features((x - self.mean) / self.std))

    def train(self, mode=True):
        """Like nn.Module.train, except that frozen features stay in eval mode."""
        super().train(mode)
        self.features.train(mode and not self.frozen)
        return self

    def transfer(self, n_classes):
        """Freezes the K features and puts a new head with one hidden layer on them: [K, N] in Table 2."""
        k, self.frozen = self.head.in_features, True
        self.features.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(k, k), nn.ReLU(), nn.Linear(k, n_classes))
        return self


def build(arch, n_classes, mean, std):
    """A new network of flags.ARCHS, in channels_last (faster). Torch's global generator draws its weights."""
    if arch == "preactresnet18":
        features, k = preactresnet(len(mean), (64, 128, 256, 512), 2), 512
    elif arch == "preactresnet18-authors":  # as in the authors' released configs
        features, k = preactresnet(len(mean), (128, 256, 512, 512), 2, stem=64, always_project=True), 512
    elif arch == "preactresnet8":
        features, k = preactresnet(len(mean), (16, 32, 64), 1), 64
    elif arch == "resnet50":
        if len(mean) != 3:
            raise UserError(f"resnet50 takes images of 3 channels, not of {len(mean)}: give another --arch")
        from torchvision.models import resnet50  # slow to import
        features, k = resnet50(weights=None), 2048
        features.fc = nn.Identity()
    else:
        raise ValueError(f"no architecture {arch!r}")
    return Classifier(features, nn.Linear(k, n_classes), mean, std).to(memory_format=torch.channels_last)


def load_model(path):
    """The Classifier of the checkpoint `path`, in eval mode, and the checkpoint's content. UserError for a
    foreign file."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the checkpoint in it, say {path / 'best.pt'}")
    ckpt = load(path, CHECKPOINT_KEYS)
    try:
        classes, (mean, std) = ckpt["classes"], (ckpt["model"][k].flatten().tolist() for k in ("mean", "std"))
        model = build(ckpt["arch"], len(classes), mean, std)
        if ckpt["head"] == "mlp":
            model.transfer(len(classes))
        model.load_state_dict(ckpt["model"])
        if not ({"dataset", "side"} <= ckpt["args"].keys() and "name" in ckpt["fingerprint"].keys()
                and set(ckpt["A_classes"] or []) <= set(classes) and isinstance(ckpt["epoch"], int)
                and len({c for c in classes if isinstance(c, str)}) == len(classes)):
            raise ValueError("its args, classes or fingerprint are not as sat.py writes them")
    except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{path} is not a checkpoint of this project: {reason}") from None
    return model.eval(), ckpt


def sgd(model, lr, weight_decay, device, state=None):
    """The optimizer of Table 2. `state`: its state_dict in a stopped run, perhaps on another device."""
    parameters, fused = [p for p in model.parameters() if p.requires_grad], device.type == "cuda"
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, fused=fused)
    if state:
        optimizer.load_state_dict(state)
        optimizer.param_groups[0]["fused"] = fused
    return optimizer


def training_network(model, device, compilation):
    """`model`, compiled as `compilation` (of choose_compilation) says, and under torchrun with gradients
    averaged over the processes. It shares its parameters with `model`, which the attacks use directly."""
    net = model if compilation == "off" else compiled(model, device, compilation)
    return net if process_count() == 1 else nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)


def share_batch_statistics(model):
    """Gives all processes the batch-norm statistics of process 0, as each collects its own in an epoch."""
    if process_count() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def precision(amp, device):
    """The arithmetic of training that --amp asks for: "bf16" (autocast) or "float32". "auto" is bf16 where
    the hardware multiplies in it: on other CPUs bf16 takes 13 times as long as float32."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        has_bf16 = has_bf16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # heeds ONEDNN_MAX_CPU_ISA
    return "bf16" if amp == "bf16" or (amp == "auto" and has_bf16) else "float32"


def choose_compilation(flag, device, steps, attack_name=None):
    """What --compile means here: "off", "on" (torch.compile; CUDA graphs on GPUs) or "step" (one CUDA graph
    of the training step; but "on" for CPUs, several processes, and pgd-authors, which reads its loss). "auto"
    is "on" if a GPU and a compiler are present and 5,000 steps or more repay a minute or two of compiling;
    else "off"."""
    if flag == "auto":
        return "on" if device.type == "cuda" and steps >= 5000 and can_compile(device) else "off"
    return "on" if flag == "step" and (
        device.type != "cuda" or process_count() > 1 or attack_name == "pgd-authors") else flag


def size_multiple(device, compilation):
    """The number of attacked examples is padded to a multiple of this: fewer sizes, fewer CUDA graphs."""
    return 16 if device.type == "cuda" and compilation != "off" else 1


def compiled(function, device, compilation):
    """A function or network, compiled; with "on", on GPUs, into CUDA graphs. Their next call overwrites the
    output, so a function's output is copied; a network's is used before the next call."""
    torch._dynamo.config.trace_autograd_ops = True  # the gradient is taken inside pgd_step's graph
    use_cuda_graphs = compilation == "on" and device.type == "cuda"
    mode = "reduce-overhead" if use_cuda_graphs else None
    compiled_function = torch.compile(function, fullgraph=True, mode=mode)
    if not use_cuda_graphs or isinstance(function, nn.Module):
        return compiled_function
    return lambda *args: torch.utils._pytree.tree_map(torch.clone, compiled_function(*args))


class GraphedStep:
    """step(*tensors), which returns nothing and changes tensors in place, as CUDA graphs: one launch in place
    of a thousand. A graph serves one learning rate, which get_lr() returns, and one shape of each tensor (or
    None). For each such combination, calls 1 and 2 run without a graph, and compile; call 3 records it. All
    run on one stream, because autograd remembers the stream of its first call."""

    def __init__(self, step, get_lr):
        self.step, self.get_lr, self.calls, self.graphs = step, get_lr, collections.Counter(), {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, *tensors):
        key = self.get_lr(), *(None if t is None else t.shape for t in tensors)
        self.calls[key] += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.calls[key] < 3:
                self.step(*tensors)
            else:
                if key not in self.graphs:
                    inputs = [None if t is None else t.clone() for t in tensors]
                    self.graphs[key] = self.record(inputs), inputs
                replay, inputs = self.graphs[key]
                for graph_input, tensor in zip(inputs, tensors):
                    if tensor is not None:
                        graph_input.copy_(tensor)
                replay()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, inputs):
        """Records the step on `inputs`, without doing it. Returns the function that does it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, self.stream, "thread_local"):
            self.step(*inputs)
        return graph.replay
