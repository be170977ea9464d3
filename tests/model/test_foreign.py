"""Files of other kinds: each is refused by its name, with what to do instead."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model import foreign, foreign_files, load_network
from ddpm_deploy.model.checkpoint import open_checkpoint
from tests.commands import contents, refusal, run
from tests.golden import make_variant
from tests.support import tiny_network, tiny_spec, write_graph

Writer = Callable[[Path], Path]


def tensors(*names: str, **shapes: Sequence[int]) -> Writer:
    """Writes a state dict with these names; `__` in a keyword stands for a dot."""
    state: dict[str, Tensor] = {name: torch.ones(4, 4) for name in names}
    state |= {name.replace("__", "."): torch.ones(*shape) for name, shape in shapes.items()}
    return saved(state)


def saved(content: Any, name: str = "ckpt.pt") -> Writer:
    def write(folder: Path) -> Path:
        torch.save(content, folder / name)
        return folder / name

    return write


def raw(content: bytes, name: str = "ckpt.pt") -> Writer:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def folder_of(**files: bytes) -> Writer:
    """Writes a folder; `__` in a name stands for a dot and `___` for a slash."""

    def write(folder: Path) -> Path:
        for name, content in files.items():
            path = folder / "run" / name.replace("___", "/").replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (folder / "run").mkdir(exist_ok=True)
        return folder / "run"

    return write


def asking_for(module: str, name: str) -> Writer:
    """Writes a pickle that asks for a class which is not here."""

    def write(folder: Path) -> Path:
        made = types.ModuleType(module)
        kind = type(name, (), {"__module__": module})
        setattr(made, name, kind)
        parents = module.split(".")
        before = dict(sys.modules)
        try:
            for count in range(1, len(parents)):
                sys.modules.setdefault(
                    ".".join(parents[:count]), types.ModuleType(".".join(parents[:count]))
                )
            sys.modules[module] = made
            (folder / "net.pkl").write_bytes(pickle.dumps({"ema": kind()}, protocol=4))
        finally:
            for added in sys.modules.keys() - before.keys():
                del sys.modules[added]
            sys.modules.update(before)
        return folder / "net.pkl"

    return write


def zipped(*names: str, name: str = "ckpt.pt") -> Writer:
    def write(folder: Path) -> Path:
        with zipfile.ZipFile(folder / name, "w") as archive:
            for each in names:
                archive.writestr(each, b"content")
        return folder / name

    return write


def npz(folder: Path) -> Path:
    np.savez(folder / "samples.npz", arr_0=np.zeros((2, 8, 8, 3)), labels=np.zeros(2))
    return folder / "samples.npz"


def picture(folder: Path) -> Path:
    Image.new("RGB", (8, 8)).save(folder / "sample.png")
    return folder / "sample.png"


def renamed_graph(folder: Path) -> Path:
    graph = onnx.load_model(write_graph(folder / "unet.onnx", tiny_spec()))
    graph.producer_name = "pytorch"
    (folder / "ckpt.pt").write_bytes(graph.SerializeToString())
    return folder / "ckpt.pt"


def tar(folder: Path) -> Path:
    with tarfile.open(folder / "runs.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return folder / "runs.tar"


def script(folder: Path) -> Path:
    return zipped("net/data.pkl", "net/constants.pkl", "net/code/x.py")(folder)


def optimizer(folder: Path) -> Path:
    return saved(torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict(), "opt.pt")(folder)


def scheduler(folder: Path) -> Path:
    inner = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    state = torch.optim.lr_scheduler.StepLR(inner, 3).state_dict()
    return saved(state, "scheduler.bin")(folder)


def whole_module(folder: Path) -> Path:
    return saved(nn.Linear(2, 2))(folder)


def a_folder_with_a_run(folder: Path) -> Path:
    run_folder = folder_of(train__log=b"", epoch_3___optim__pt=b"")(folder)
    torch.save({}, run_folder / "last.pt")
    torch.save({}, run_folder / "ema_last.pt")
    return run_folder


LDM = "model.diffusion_model.input_blocks.0.0.weight"

KINDS: dict[str, tuple[Writer, str, str]] = {
    # what is written, what the message says, what the hint says
    "optimizer": (optimizer, "is an optimizer's state", "export"),
    "training state": (
        saved({"optimizer": {"state": {}}, "epoch": 3}),
        "the state of a training without its network: epoch, optimizer",
        "beside it",
    ),
    "scheduler": (scheduler, "is a learning-rate scheduler's state", "beside it"),
    "random states": (
        saved({"step": 1, "torch_manual_seed": torch.zeros(3)}),
        "the state of random generators",
        "beside it",
    ),
    "EMA without names": (
        saved({"decay": 0.99, "shadow_params": [torch.zeros(3)], "optimization_step": 3}),
        "its EMA weights as a list without names",
        "ema.copy_to",
    ),
    "ermongroup/ddim": (
        saved([{"module.conv_in.weight": torch.zeros(3)}, {"state": {}}, 3, 1000]),
        "holds a list of 4, as ermongroup/ddim saves it",
        "torch.load(FILE)[0]",
    ),
    "DeepSpeed's shard": (
        saved({"module": {"a": torch.zeros(0)}, "ds_version": "0.14", "param_shapes": []}),
        "is a shard of DeepSpeed's ZeRO",
        "zero_to_fp32.py",
    ),
    "several networks": (
        saved({"G": {"a": torch.zeros(3)}, "D": {"b": torch.zeros(3)}}),
        "holds several networks: G (1 tensors), D (1 tensors)",
        "--set key=G",
    ),
    "textual inversion": (
        saved({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(1, 768)}}),
        "is a textual inversion",
        "latents",
    ),
    "Stable Diffusion": (
        tensors(LDM, "first_stage_model.decoder.conv_in.weight", "cond_stage_model.a.weight"),
        "is a whole Stable Diffusion 1 or 2",
        "diffusers or ComfyUI",
    ),
    "SDXL": (
        tensors(LDM, "conditioner.embedders.0.a.weight", "first_stage_model.decoder.a"),
        "is a whole Stable Diffusion XL",
        "latents",
    ),
    "latent diffusion": (
        tensors(LDM, "first_stage_model.decoder.conv_in.weight", "betas"),
        "is a latent diffusion model of CompVis",
        "autoencoder",
    ),
    "U-Net of latent diffusion": (
        tensors(LDM, "model.diffusion_model.time_embed.0.weight"),
        "is the U-Net of a latent diffusion model, by CompVis' names",
        "latents",
    ),
    "latent U-Net, bare": (
        tensors("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", "time_embed.0.weight"),
        "is a U-Net with text attention by OpenAI's names",
        "latents",
    ),
    "UNet2DCondition": (
        tensors(
            "conv_in.weight",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        ),
        "(UNet2DConditionModel)",
        "latents",
    ),
    "SDXL's UNet2DCondition": (
        tensors(
            "add_embedding.linear_1.weight",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        ),
        "is the U-Net of Stable Diffusion XL in diffusers' form",
        "latents",
    ),
    "video U-Net": (
        tensors("down_blocks.0.temp_convs.0.conv1.0.weight", "conv_in.weight"),
        "is a video U-Net of diffusers",
        "pictures or sequences",
    ),
    "SD3": (
        tensors("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
        "is Stable Diffusion 3",
        "latents",
    ),
    "SD3 of diffusers": (
        tensors("transformer_blocks.0.attn.add_k_proj.weight", "pos_embed.proj.weight"),
        "is the transformer of Stable Diffusion 3 in diffusers' form",
        "latents",
    ),
    "Flux": (
        tensors("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"),
        "is Flux",
        "latents",
    ),
    "PixArt": (
        tensors("adaln_single.linear.weight", "transformer_blocks.0.scale_shift_table"),
        "is PixArt",
        "latents",
    ),
    "DiT": (
        tensors("x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.weight"),
        "is a DiT (facebookresearch/DiT",
        "--model package.module:factory",
    ),
    "DiT of diffusers": (
        tensors("pos_embed.proj.weight", "transformer_blocks.0.norm1.emb.timestep_embedder.a"),
        "is a DiT in diffusers' form",
        "latents",
    ),
    "U-ViT": (
        tensors("in_blocks.0.attn.qkv.weight", "out_blocks.0.skip_linear.weight"),
        "is a U-ViT",
        "--model",
    ),
    "ControlNet": (
        tensors("controlnet_cond_embedding.conv_in.weight", "conv_in.weight"),
        "is a ControlNet",
        "latents",
    ),
    "T2I-Adapter": (
        tensors("adapter.body.0.resnets.0.block1.weight", "adapter.conv_in.weight"),
        "is a T2I-Adapter",
        "latents",
    ),
    "IP-Adapter": (
        tensors("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
        "is an IP-Adapter",
        "latents",
    ),
    "AnimateDiff": (
        tensors("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"),
        "is a motion module of AnimateDiff",
        "latents",
    ),
    "VAE": (
        tensors("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"),
        "is an autoencoder (VAE)",
        "pixels",
    ),
    "half a VAE": (
        tensors("decoder.conv_in.weight", "decoder.mid_block.resnets.0.conv1.weight"),
        "is one half of an autoencoder",
        "pixels",
    ),
    "VQGAN": (
        tensors("encoder.conv_in.weight", "decoder.conv_in.weight", "quantize.embedding.weight"),
        "is a VQGAN or VQ-VAE",
        "pixels",
    ),
    "CLIP": (
        tensors("vision_model.encoder.a.weight", "text_model.encoder.b.weight", "logit_scale"),
        "is a CLIP with its picture and text encoders",
        "pixels",
    ),
    "CLIP text encoder": (
        tensors("text_model.embeddings.token_embedding.weight"),
        "is the text encoder of CLIP",
        "pixels",
    ),
    "T5": (
        tensors("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"),
        "is a T5 text encoder",
        "pixels",
    ),
    "kohya LoRA": (
        tensors("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
        "is a LoRA in the form of kohya's scripts",
        "merge_lora.py",
    ),
    "LoRA": (
        tensors("unet.down_blocks.0.attentions.0.to_q.lora_A.weight"),
        "is a LoRA of peft or diffusers",
        "merge_and_unload",
    ),
    "LyCORIS": (
        tensors("lora_unet_mid_block.hada_w1_a", "lora_unet_mid_block.hada_w1_b"),
        "is a LyCORIS file",
        "lycoris",
    ),
    "OpenAI classifier": (
        tensors("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.positional_embedding"),
        "is a noisy classifier of guided-diffusion",
        "256x256_diffusion.pt",
    ),
    "OpenAI super-resolution": (
        tensors(
            "time_embed.0.weight",
            "output_blocks.0.0.in_layers.0.weight",
            input_blocks__0__0__weight=(8, 6, 3, 3),
        ),
        "is a super-resolution network of improved- or guided-diffusion",
        "small pictures",
    ),
    "Imagen": (
        tensors("unets.0.init_conv.convs.0.weight", "unets.1.init_conv.convs.0.weight"),
        "is an Imagen of lucidrains",
        "pixels",
    ),
    "DALL-E 2": (
        tensors("decoder.unets.0.init_conv.weight", "prior.net.causal_transformer.a"),
        "is a DALL-E 2 of lucidrains",
        "pixels",
    ),
    "classifier-free guidance": (
        tensors("downs.0.0.block1.proj.weight", "null_classes_emb", "classes_mlp.0.weight"),
        "is a class-conditional U-Net of lucidrains",
        "--model",
    ),
    "video diffusion": (
        tensors("downs.0.0.block1.proj.weight", init_conv__weight=(4, 3, 1, 7, 7)),
        "is a video diffusion model of lucidrains",
        "--model",
    ),
    "KarrasUnet": (
        tensors("input_block.weight", "to_time_emb.0.weights", "downs.0.block1.1.weight"),
        "is a KarrasUnet of lucidrains",
        "GaussianDiffusion",
    ),
    "learned sinusoids": (
        tensors("downs.0.0.block1.proj.weight", "time_mlp.0.weights", "init_conv.weight"),
        "is a U-Net of lucidrains' continuous-time models",
        "GaussianDiffusion",
    ),
    "annotated diffusion": (
        tensors("downs.0.0.mlp.1.weight", "downs.0.0.ds_conv.weight", "downs.0.2.fn.norm.weight"),
        "notebook The Annotated Diffusion Model",
        "--model",
    ),
    "w86763777": (
        tensors("time_embedding.timembedding.0.weight", "head.weight", "downblocks.0.a.weight"),
        "is a network of w86763777/pytorch-ddpm",
        "--model",
    ),
    "labml": (
        tensors("image_proj.weight", "time_emb.lin1.weight", "down.0.res.conv1.weight"),
        "is the U-Net of labml's annotated DDPM",
        "--model",
    ),
    "TeaPearce": (
        tensors("nn_model.timeembed1.model.0.weight", "nn_model.contextembed1.a", "sqrta"),
        "is TeaPearce's Conditional_Diffusion_MNIST",
        "--model",
    ),
    "minDiffusion": (
        tensors("eps_model.conv.0.0.weight", "mab_over_sqrtmab", "oneover_sqrta"),
        "is a network of cloneofsimo/minDiffusion",
        "--model",
    ),
    "score_sde": (
        tensors("module.all_modules.0.W", "module.sigmas"),
        "is a score network of yang-song/score_sde_pytorch",
        "--model",
    ),
    "NCSN": (
        tensors("begin_conv.weight", "refine1.adapt_convs.0.weight"),
        "is a noise-conditional score network",
        "pixels",
    ),
    "EDM": (
        tensors("model.enc.32x32_conv.weight", "model.map_layer0.weight"),
        "is a network of NVlabs' EDM",
        "--model",
    ),
    "StyleGAN": (
        tensors("synthesis.b4.conv1.weight", "mapping.fc0.weight"),
        "is a StyleGAN",
        "pixels",
    ),
    "ESRGAN": (
        saved({"params_ema": {"body.0.rdb1.conv1.weight": torch.zeros(3)}}),
        "is an ESRGAN upscaler",
        "spandrel",
    ),
    "SwinIR": (
        tensors("layers.0.residual_group.blocks.0.attn.qkv.weight"),
        "is a SwinIR or HAT upscaler",
        "spandrel",
    ),
    "YOLO": (
        tensors("model.22.dfl.conv.weight", "model.0.conv.weight"),
        "is the weights of a YOLO detector",
        "yolo export",
    ),
    "language model": (
        tensors("model.layers.0.self_attn.q_proj.weight", "lm_head.weight"),
        "is a language model",
        "llama.cpp",
    ),
    "GPT-2": (tensors("transformer.h.0.attn.c_attn.weight"), "is a GPT-2", "pixels"),
    "BERT": (
        tensors(
            "bert.encoder.layer.0.attention.self.query.weight",
            "bert.embeddings.word_embeddings.weight",
        ),
        "is a BERT",
        "pixels",
    ),
    "ViT": (tensors("cls_token", "blocks.0.attn.qkv.weight"), "is a vision transformer", "pixels"),
    "Inception": (tensors("Mixed_5b.branch1x1.conv.weight"), "is an Inception v3", "pixels"),
    "ResNet": (tensors("layer1.0.conv1.weight", "fc.weight"), "is a ResNet", "pixels"),
    "classifier": (
        tensors("features.0.weight", "classifier.6.weight"),
        "is a classifier of torchvision or timm",
        "pixels",
    ),
    # Pickles
    "EDM's pickle": (
        asking_for("torch_utils.persistence", "_reconstruct_persistent_obj"),
        "NVlabs' StyleGAN and EDM save their networks so",
        "noise level",
    ),
    "YOLO's pickle": (
        asking_for("ultralytics.nn.tasks", "DetectionModel"),
        "YOLO of ultralytics is saved so",
        "yolo export",
    ),
    "Lightning's pickle": (
        asking_for("pytorch_lightning.callbacks", "ModelCheckpoint"),
        "Lightning saves its hyper-parameters so",
        "['state_dict']",
    ),
    "a whole module": (
        whole_module,
        "Whole modules are saved so, by torch.save(model)",
        "state_dict()",
    ),
    "a project's own class": (
        asking_for("my.project", "Config"),
        "it asks for my.project.Config. ddpm-deploy reads tensors only",
        "state_dict()",
    ),
    # Files of other forms
    "TorchScript": (script, "is a TorchScript archive", "torch.jit.load"),
    "Keras HDF5": (raw(b"\x89HDF\r\n\x1a\n" + bytes(99), "w.h5"), "is an HDF5 file", "PyTorch"),
    "Keras 3": (
        zipped("config.json", "metadata.json", "model.weights.h5", name="m.keras"),
        "is a model of Keras 3",
        "PyTorch",
    ),
    "TensorFlow checkpoint": (
        raw(bytes(99), "model.ckpt-1000.data-00000-of-00001"),
        "is a part of a TensorFlow checkpoint",
        "PyTorch",
    ),
    "TensorFlow graph": (raw(bytes(99), "saved_model.pb"), "is a TensorFlow graph", "PyTorch"),
    "TensorFlow Lite": (raw(b"\x1c\0\0\0TFL3" + bytes(99)), "is a TensorFlow Lite model", "Py"),
    "Flax": (raw(b"\x81\xa6params", "flax_model.msgpack"), "is msgpack, as Flax", "from_flax"),
    "GGUF": (raw(b"GGUF\3\0\0\0" + bytes(99), "m.gguf"), "is a GGUF file", "converted from"),
    "NumPy archive": (npz, "is a NumPy archive (.npz) of 2 arrays: arr_0, labels", "state_dict"),
    "NumPy array": (raw(b"\x93NUMPY\1\0", "x.npy"), "is one NumPy array", "state_dict()"),
    "JSON": (raw(b'{"sample_size": 32}', "config.json"), "is JSON", "folder"),
    "YAML": (raw(b"model:\n  channels: 64\n", "config.yaml"), "is a configuration", "weights"),
    "CSV": (raw(b"epoch,loss\n1,0.5\n2,0.3\n", "log.csv"), "is a table of numbers", ".safetensors"),
    "Python": (raw(b"import torch\n\nclass UNet: ...\n", "unet.py"), "is Python code", "--model"),
    "picture": (picture, "is a picture", ".safetensors"),
    "film": (raw(b"\0\0\0\x20ftypisom" + bytes(99), "x.mp4"), "is a film or a sound", ".pt"),
    "PDF": (raw(b"%PDF-1.7\n", "paper.pdf"), "is a PDF", ".pt"),
    "ONNX": (lambda f: write_graph(f / "u.onnx", None), "u.onnx is an engine already", "sample"),
    "renamed ONNX": (renamed_graph, "is an ONNX file under another name", "Rename it"),
    "plan": (raw(b"ftrt\0\0" + bytes(99), "u.engine"), "is a plan of TensorRT", "built from"),
    "zip": (
        zipped("run/ckpt.pt", "run/log.txt", name="run.zip"),
        "is a zip archive that torch did not write: it holds run/ckpt.pt, run/log.txt",
        "give run/ckpt.pt: unzip",
    ),
    "tar": (tar, "is a tar archive", "tar -xf"),
    "packed": (raw(b"\x1f\x8b\x08" + bytes(99), "ckpt.pt.gz"), "is packed (gzip", "Unpack it"),
    "program": (raw(b"\x7fELF" + bytes(99), "ckpt.bin"), "is a program or a library", ".pt"),
    "SQLite": (raw(b"SQLite format 3\0", "optuna.db"), "is an SQLite database", ".pt"),
    "Parquet": (raw(b"PAR1" + bytes(99), "train.parquet"), "is a table of data", ".pt"),
    "TensorBoard": (
        raw(bytes(99), "events.out.tfevents.17.a"),
        "is a log of TensorBoard",
        "beside",
    ),
    "git-lfs pointer": (
        raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "m.safetensors"),
        "is a pointer of git-lfs",
        "git lfs pull",
    ),
    "web page": (raw(b"\n<!DOCTYPE html><html><body>404"), "is a web page", "/resolve/"),
    "XML": (raw(b'<?xml version="1.0"?><Error><Code>AccessDenied'), "is XML", "fetch the file"),
    "download": (raw(bytes(99), "ckpt.pt.part"), "is a download that is not finished", "anew"),
    "empty file": (raw(b""), "is damaged, or is no checkpoint: it is empty", "sha256sum"),
    "half a file": (raw(b"PK\3\4" + bytes(99)), "an archive whose end is missing", "sha256sum"),
    "text": (raw(b"hello"), "it is neither an archive nor a pickle", "sha256sum"),
    # Folders
    "empty folder": (folder_of(), "is a folder; a checkpoint is a file", "It is empty"),
    "a run's folder": (
        a_folder_with_a_run,
        "it holds ema_last.pt, epoch_3/, last.pt, train.log",
        "run/ema_last.pt",
    ),
    "a folder of pictures": (folder_of(a__png=b"", b__png=b""), "it holds a.png, b.png", "suffix"),
    "DeepSpeed": (
        folder_of(zero_to_fp32__py=b"", global_step1___a__pt=b""),
        "is a folder of DeepSpeed",
        "zero_to_fp32.py",
    ),
    "FSDP": (
        folder_of(pytorch_model_fsdp_0_____0_0__distcp=b"", optimizer__bin=b""),
        "is a sharded checkpoint of FSDP",
        "dcp_to_torch",
    ),
    "shards": (
        folder_of(**{"model__safetensors__index__json": b"{}"}),
        "holds weights in shards, as model.safetensors.index.json lists them",
        "one file",
    ),
    "SavedModel": (folder_of(saved_model__pb=b""), "is a SavedModel of TensorFlow", "PyTorch"),
    "TensorFlow's folder": (
        folder_of(checkpoint=b"", **{"m__ckpt-1__index": b""}),
        "is a folder of TensorFlow checkpoints",
        "PyTorch",
    ),
    "Orbax": (folder_of(_CHECKPOINT_METADATA=b"{}"), "is a checkpoint of Orbax", "PyTorch"),
    "hub cache": (
        folder_of(refs___main=b"", snapshots___abc___config__json=b"{}"),
        "is a cache of huggingface_hub",
        "snapshots/abc",
    ),
    "LoRA's folder": (folder_of(adapter_config__json=b"{}"), "is a folder of a LoRA", "Merge it"),
    "pipeline": (
        folder_of(model_index__json=b'{"_class_name": "StableDiffusionPipeline"}'),
        "is a StableDiffusionPipeline of diffusers",
        "DDPMPipeline",
    ),
    "transformers' folder": (
        folder_of(config__json=b'{"architectures": ["LlamaForCausalLM"]}'),
        "is a LlamaForCausalLM, which",
        "UNet2DModel",
    ),
}


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_network(path)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    write, message, hint = KINDS[name]
    path = write(tmp_path)
    error = refused(path)
    assert message in str(error)
    assert hint in error.hint
    assert str(path) in str(error)
    before = contents(tmp_path)
    outcome = run("export", path, "-o", tmp_path / "unet.onnx")
    assert refusal(outcome) == str(error)
    assert f" hint: {error.hint}" in outcome.err
    assert contents(tmp_path) == before


def test_every_kind_has_a_message_of_its_own(tmp_path: Path) -> None:
    messages = {}
    for number, (name, (write, _, _)) in enumerate(KINDS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write(folder)
        messages[name] = str(refused(path)).replace(str(path), "FILE").replace(str(folder), "")
    assert len(messages) >= 100
    said: dict[str, str] = {}
    for name, message in messages.items():
        assert message not in said, (name, said.get(message))
        said[message] = name
    known = [*(k.says for k in foreign.KINDS), *(k.says for k in foreign_files.KINDS)]
    assert [says for says in known if f"FILE is {says}." not in said] == []


@pytest.mark.parametrize(
    "variant",
    [
        "openai/improved_cosine4000",
        "openai/guided_small_cond",
        "lucidrains/v2_default",
        "lucidrains/v1_5_4",
        "diffusers/tutorial_small",
        "policy/columbia_lowdim",
        "policy/lerobot_new",
    ],
)
def test_a_network_of_a_family_is_of_no_other_kind(tmp_path: Path, variant: str) -> None:
    make_variant(variant, tmp_path)
    files = [f for f in tmp_path.rglob("*") if f.suffix in {".pt", ".bin", ".safetensors", ".ckpt"}]
    assert files
    for file in files:
        opened = open_checkpoint(file)
        foreign.check_names(opened.state, str(file))
        foreign.check_names(opened.whole or {}, str(file), around=True)


def test_what_stands_beside_a_network_does_not_make_it_another(tmp_path: Path) -> None:
    state = {f"model.{k}": v for k, v in tiny_network(channels=3).state_dict().items()}
    beside = {
        "fid.inception.Mixed_5b.branch1x1.conv.weight": torch.zeros(2, 2),
        "lpips.lin0.model.1.weight": torch.zeros(2),
        "clip.visual.conv1.weight": torch.zeros(2, 2),
    }
    torch.save({"state_dict": {**state, **beside}, "epoch": 1}, tmp_path / "last.ckpt")
    assert load_network(tmp_path / "last.ckpt").spec.family == "dome272"


def test_a_configuration_that_is_damaged_is_no_class(tmp_path: Path) -> None:
    for content in (b"{", b"[]", b'{"_class_name": 3}', b"\xff", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        wanted = "holds a 3: another" if b"3" in content else "is a folder without a model"
        assert wanted in str(refused(tmp_path))
