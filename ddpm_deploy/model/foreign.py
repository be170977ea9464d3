"""Files that are something else: each told by what it holds, and refused by its name.

Kinds of tensors, of contents and of pickles; `foreign_files` has those that are told by their
first bytes, and folders. The first kind that fits is taken, so the particular ones stand first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.family import State


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A kind of file that holds tensors, and no network that this package reads.

    Attributes:
        name: For tests and lists.
        says: What the file is, after "is".
        hint: What to type or get instead.
        has: Patterns, each of which fits in some tensor's name.
        lacks: Patterns, none of which fits in any.
        shapes: What the shapes must be besides, where names do not tell.
        around: Whether a network of pixels' names may stand inside, which it makes none.
    """

    name: str
    says: str
    hint: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    shapes: Callable[[State], bool] | None = None
    around: bool = False

    def matches(self, state: State, names: str) -> bool:
        """Tells whether tensors are of this kind; `names` are theirs, one a line."""
        return (
            all(re.search(pattern, names, re.MULTILINE) for pattern in self.has)
            and not any(re.search(pattern, names, re.MULTILINE) for pattern in self.lacks)
            and (self.shapes is None or self.shapes(state))
        )


def _rank(ending: str, dims: int) -> Callable[[State], bool]:
    def test(state: State) -> bool:
        return any(k.endswith(ending) and v.dim() == dims for k, v in state.items())

    return test


def _sides(ending: str, test: Callable[[Tensor], bool]) -> Callable[[State], bool]:
    return lambda state: any(test(v) for k, v in state.items() if k.endswith(ending))


_PIXELS = "Give a checkpoint whose network predicts the pixels themselves; see docs/checkpoints.md"
_LATENT = (
    "Networks of latents need an autoencoder and a text encoder around them: deploy them with "
    "diffusers or ComfyUI. " + _PIXELS
)
_OWN = (
    "It is a network like any other to: ddpm-deploy export FILE --model package.module:factory "
    "--spec spec.toml (docs/own-networks.md)"
)

KINDS: tuple[Foreign, ...] = (
    # Small parts that change another network
    Foreign(
        name="kohya LoRA",
        says="a LoRA in the form of kohya's scripts: changes to the weights of another network",
        hint="Merge it into its network first, as sd-scripts' merge_lora.py does; a latent one is "
        "not for this package even then.",
        has=(r"lora_(unet|te\d?)_.*\.(lora_(up|down)\.weight|alpha)$",),
    ),
    Foreign(
        name="LyCORIS",
        says="a LyCORIS file (LoHa or LoKr): changes to the weights of another network",
        hint="Merge it into its network with lycoris' own tools first.",
        has=(r"\.(hada_w1_a|lokr_w1(_a)?)$",),
    ),
    Foreign(
        name="LoRA",
        says="a LoRA of peft or diffusers: changes to the weights of another network",
        hint="Merge it into its network and save that: model.merge_and_unload(), then "
        "torch.save(model.state_dict(), 'ckpt.pt')",
        has=(r"\.lora_[AB]\.|\.lora_[AB]$|\.lora\.(up|down)\.|_lora\.(up|down)\.",),
    ),
    Foreign(
        name="IP-Adapter",
        says="an IP-Adapter for Stable Diffusion",
        hint=_LATENT,
        has=(r"(^|\.)to_[kv]_ip\.weight$|^ip_adapter\.",),
    ),
    Foreign(
        name="ControlNet",
        says="a ControlNet: a guide for Stable Diffusion, and no network that samples alone",
        hint=_LATENT,
        has=(
            r"controlnet_(cond_embedding|down_blocks)\.|(^|\.)input_hint_block\.|^control_model\.",
        ),
    ),
    Foreign(
        name="T2I-Adapter",
        says="a T2I-Adapter: a guide for Stable Diffusion, and no network that samples alone",
        hint=_LATENT,
        has=(r"(^|adapter\.)body\.\d+\.(resnets\.\d+\.)?block1\.weight$",),
    ),
    Foreign(
        name="AnimateDiff",
        says="a motion module of AnimateDiff, for Stable Diffusion",
        hint=_LATENT,
        has=(r"motion_modules\.\d+\.temporal_transformer\.",),
    ),
    # Latent diffusion
    Foreign(
        name="SDXL",
        says="a whole Stable Diffusion XL: a U-Net of latents, an autoencoder and text encoders",
        hint=_LATENT,
        has=(r"^conditioner\.embedders\.", r"diffusion_model\."),
        around=True,
    ),
    Foreign(
        name="SD3",
        says="Stable Diffusion 3: a transformer of latents",
        hint=_LATENT,
        has=(r"(^|\.)joint_blocks\.0\.(x|context)_block\.",),
    ),
    Foreign(
        name="SD3 of diffusers",
        says="the transformer of Stable Diffusion 3 in diffusers' form (SD3Transformer2DModel)",
        hint=_LATENT,
        has=(r"^transformer_blocks\.0\.attn\.add_k_proj", r"^pos_embed\.proj\."),
    ),
    Foreign(
        name="Flux",
        says="Flux: a transformer of latents",
        hint=_LATENT,
        has=(r"(^|\.)(double_blocks\.0\.img_attn|single_transformer_blocks\.0\.)",),
    ),
    Foreign(
        name="Stable Diffusion",
        says="a whole Stable Diffusion 1 or 2: a U-Net of latents, an autoencoder, a text encoder",
        hint=_LATENT,
        has=(r"cond_stage_model\.", r"diffusion_model\."),
        around=True,
    ),
    Foreign(
        name="latent diffusion",
        says="a latent diffusion model of CompVis: a U-Net of latents and an autoencoder",
        hint=_LATENT,
        has=(r"first_stage_model\.", r"diffusion_model\."),
        around=True,
    ),
    Foreign(
        name="U-Net of latent diffusion",
        says="the U-Net of a latent diffusion model, by CompVis' names",
        hint=_LATENT,
        has=(r"(^|\.)diffusion_model\.(input_blocks|time_embed)\.",),
        around=True,
    ),
    Foreign(
        name="latent U-Net with transformers",
        says="a U-Net with text attention by OpenAI's names, as latent diffusion has it",
        hint=_LATENT,
        has=(r"^input_blocks\.", r"transformer_blocks\.|\.proj_in\."),
    ),
    Foreign(
        name="SDXL's UNet2DCondition",
        says="the U-Net of Stable Diffusion XL in diffusers' form (UNet2DConditionModel)",
        hint=_LATENT,
        has=(r"^add_embedding\.linear_1\.", r"transformer_blocks\.\d+\.attn2\."),
    ),
    Foreign(
        name="UNet2DCondition",
        says="a U-Net that text guides, in diffusers' form (UNet2DConditionModel)",
        hint=_LATENT,
        has=(r"^(down_blocks|mid_block)\..*transformer_blocks\.\d+\.attn2\.",),
        lacks=(r"temp_convs|temp_attentions",),
    ),
    Foreign(
        name="video U-Net of diffusers",
        says="a video U-Net of diffusers (UNet3DConditionModel)",
        hint="Samples here are pictures or sequences. " + _PIXELS,
        has=(r"temp_convs\.|temp_attentions\.",),
    ),
    # Transformers that diffuse
    Foreign(
        name="PixArt",
        says="PixArt: a transformer of latents",
        hint=_LATENT,
        has=(r"^(adaln_single\.|scale_shift_table$|t_block\.1\.)",),
    ),
    Foreign(
        name="DiT of diffusers",
        says="a DiT in diffusers' form (DiTTransformer2DModel), of latents",
        hint=_LATENT,
        has=(r"^transformer_blocks\.0\.norm1\.(emb\.timestep_embedder|linear)\.", r"^pos_embed\."),
    ),
    Foreign(
        name="DiT",
        says="a DiT (facebookresearch/DiT, SiT and their kin): a transformer, mostly of latents",
        hint=_OWN,
        has=(r"^blocks\.0\.adaLN_modulation\.", r"^x_embedder\."),
    ),
    Foreign(
        name="U-ViT",
        says="a U-ViT (baofff/U-ViT)",
        hint=_OWN,
        has=(r"^in_blocks\.0\.attn\.qkv\.", r"^out_blocks\.0\.skip_linear\."),
    ),
    # Autoencoders and encoders
    Foreign(
        name="VQGAN",
        says="a VQGAN or VQ-VAE: an autoencoder with a codebook, which does not sample by itself",
        hint=_PIXELS,
        has=(r"(^|\.)quantize\.embedding\.weight$", r"(^|\.)decoder\."),
    ),
    Foreign(
        name="VAE",
        says="an autoencoder (VAE), as latent diffusion has it",
        hint=_PIXELS,
        has=(r"(^|\.)encoder\.(down|conv_in|mid)", r"(^|\.)decoder\.", r"(^|\.)quant_conv\."),
    ),
    Foreign(
        name="decoder",
        says="one half of an autoencoder (its encoder or decoder alone)",
        hint=_PIXELS,
        has=(r"^(encoder|decoder)\.(conv_in|mid_block|mid)\.",),
    ),
    Foreign(
        name="CLIP",
        says="a CLIP with its picture and text encoders",
        hint=_PIXELS,
        has=(r"(^|\.)(vision_model\.|visual\.)", r"(text_model\.|token_embedding\.weight|^logit_)"),
    ),
    Foreign(
        name="CLIP text encoder",
        says="the text encoder of CLIP, as Stable Diffusion has it",
        hint=_PIXELS,
        has=(r"text_model\.(encoder|embeddings)\.",),
    ),
    Foreign(
        name="T5",
        says="a T5 text encoder",
        hint=_PIXELS,
        has=(r"(^|\.)block\.0\.layer\.0\.SelfAttention\.q\.weight$",),
    ),
    # Relatives of the families
    Foreign(
        name="OpenAI classifier",
        says="a noisy classifier of guided-diffusion, which guides a sampler and is none",
        hint="Give the diffusion model beside it, 256x256_diffusion.pt or ema_0.9999_*.pt.",
        has=(r"^time_embed\.0\.weight$", r"^input_blocks\.0\.0\.weight$"),
        lacks=(r"^output_blocks\.",),
    ),
    Foreign(
        name="OpenAI super-resolution",
        says="a super-resolution network of improved- or guided-diffusion: it takes a small "
        "picture beside x",
        hint="Give the network that draws the small pictures. " + _OWN,
        has=(r"^time_embed\.0\.weight$", r"^output_blocks\."),
        shapes=_sides("input_blocks.0.0.weight", lambda v: v.dim() == 4 and v.shape[1] == 6),
    ),
    Foreign(
        name="DALL-E 2",
        says="a DALL-E 2 of lucidrains (dalle2-pytorch)",
        hint=_PIXELS,
        has=(r"(^|\.)(prior|net)\.causal_transformer\.|(^|\.)decoder\.unets\.",),
        around=True,
    ),
    Foreign(
        name="Imagen",
        says="an Imagen of lucidrains (imagen-pytorch): several U-Nets that text guides",
        hint=_PIXELS,
        has=(r"(^|\.)unets\.\d+\.",),
        around=True,
    ),
    Foreign(
        name="classifier-free guidance of lucidrains",
        says="a class-conditional U-Net of lucidrains (classifier_free_guidance.py)",
        hint=_OWN,
        has=(r"(^|\.)null_classes_emb$", r"(^|\.)classes_mlp\.|(^|\.)classes_emb\.weight$"),
    ),
    Foreign(
        name="video diffusion of lucidrains",
        says="a video diffusion model of lucidrains (video-diffusion-pytorch)",
        hint="Samples here are pictures or sequences. " + _OWN,
        has=(r"(^|\.)downs\.0\.0\.", r"(^|\.)init_conv\.weight$"),
        shapes=_rank("init_conv.weight", 5),
    ),
    Foreign(
        name="KarrasUnet of lucidrains",
        says="a KarrasUnet of lucidrains: its time is a noise level, in random sinusoids",
        hint="Train the package's Unet with GaussianDiffusion. " + _OWN,
        has=(r"(^|\.)to_time_emb\.0\.weights$", r"(^|\.)downs\.0\."),
    ),
    Foreign(
        name="learned sinusoids of lucidrains",
        says="a U-Net of lucidrains' continuous-time models: its time is log-SNR, in learned "
        "sinusoids",
        hint="Train with GaussianDiffusion, whose timesteps are counted. " + _OWN,
        has=(r"(^|\.)time_mlp\.0\.weights$", r"(^|\.)downs\.0\.0\."),
    ),
    Foreign(
        name="annotated diffusion",
        says="the U-Net of Hugging Face's notebook The Annotated Diffusion Model, or a lucidrains "
        "older than 0.27.4",
        hint=_OWN,
        has=(r"(^|\.)downs\.0\.0\.", r"\.fn\.norm\.(weight|b)$|\.ds_conv\.|norm\.b$"),
    ),
    Foreign(
        name="w86763777",
        says="a network of w86763777/pytorch-ddpm, or one of its copies",
        hint=_OWN,
        has=(r"(^|\.)time_embedding\.timembedding\.0\.weight$",),
    ),
    Foreign(
        name="labml",
        says="the U-Net of labml's annotated DDPM",
        hint=_OWN,
        has=(r"(^|\.)image_proj\.weight$", r"(^|\.)time_emb\.lin1\.weight$"),
    ),
    Foreign(
        name="TeaPearce",
        says="TeaPearce's Conditional_Diffusion_MNIST: it takes t / T, and a mask beside the label",
        hint=_OWN,
        has=(r"(^|\.)timeembed1\.", r"(^|\.)contextembed1\."),
    ),
    Foreign(
        name="minDiffusion",
        says="a network of cloneofsimo/minDiffusion",
        hint=_OWN,
        has=(r"(^|\.)(mab_over_sqrtmab|oneover_sqrta)$",),
    ),
    Foreign(
        name="score_sde",
        says="a score network of yang-song/score_sde_pytorch, whose time is continuous",
        hint=_OWN,
        has=(r"(^|\.)all_modules\.\d+\.",),
    ),
    Foreign(
        name="NCSN",
        says="a noise-conditional score network (ermongroup/ncsn): it is given noise levels, not "
        "timesteps",
        hint=_PIXELS,
        has=(r"(^|\.)begin_conv\.weight$", r"(^|\.)refine1\."),
    ),
    Foreign(
        name="EDM",
        says="a network of NVlabs' EDM, whose time is a continuous noise level σ",
        hint=_OWN,
        has=(r"(^|\.)enc\.\d+x\d+_(conv|block\d+)\.",),
    ),
    # Generators of other kinds
    Foreign(
        name="StyleGAN",
        says="a StyleGAN: a generator that draws in one step, and no diffusion model",
        hint=_PIXELS,
        has=(
            r"(^|\.)(synthesis\.b\d+\.conv\d\.|mapping\.fc\d\.|convs?\d?\.\d*\.?conv\.modulation\.)",
        ),
    ),
    Foreign(
        name="ESRGAN",
        says="an ESRGAN upscaler (RRDBNet), and no diffusion model",
        hint="Upscalers run with spandrel. " + _PIXELS,
        has=(r"(RDB1\.conv1|rdb1\.conv1)\.",),
    ),
    Foreign(
        name="SwinIR",
        says="a SwinIR or HAT upscaler, and no diffusion model",
        hint="Upscalers run with spandrel. " + _PIXELS,
        has=(r"(^|\.)layers\.0\.residual_group\.blocks\.",),
    ),
    # What sees or reads
    Foreign(
        name="YOLO",
        says="the weights of a YOLO detector, and no diffusion model",
        hint="ultralytics exports it: yolo export model=FILE format=onnx",
        has=(r"(^|\.)\d+\.(dfl\.conv|cv2\.0\.0\.conv|m\.0\.cv1\.conv)\.weight$",),
    ),
    Foreign(
        name="language model",
        says="a language model (Llama and its kin), and no diffusion model",
        hint="Language models run with llama.cpp or vLLM. " + _PIXELS,
        has=(r"(^|\.)layers\.\d+\.self_attn\.q_proj\.weight$",),
        lacks=(r"(vision|text)_model\.",),
    ),
    Foreign(
        name="GPT-2",
        says="a GPT-2, and no diffusion model",
        hint=_PIXELS,
        has=(r"(^|\.)h\.0\.attn\.c_attn\.weight$",),
    ),
    Foreign(
        name="BERT",
        says="a BERT, and no diffusion model",
        hint=_PIXELS,
        has=(r"encoder\.layer\.0\.attention\.self\.query\.weight$", r"word_embeddings\.weight$"),
    ),
    Foreign(
        name="ViT",
        says="a vision transformer (ViT) that classifies, and no diffusion model",
        hint=_PIXELS,
        has=(r"(^|\.)(cls_token|class_token)$",),
    ),
    Foreign(
        name="Inception",
        says="an Inception v3, as FID is measured with, and no diffusion model",
        hint=_PIXELS,
        has=(r"(^|\.)Mixed_5b\.",),
    ),
    Foreign(
        name="ResNet",
        says="a ResNet that classifies, and no diffusion model",
        hint=_PIXELS,
        has=(r"(^|\.)layer1\.0\.conv1\.weight$", r"(^|\.)(fc\.weight|bn1\.running_mean)$"),
    ),
    Foreign(
        name="classifier",
        says="a classifier of torchvision or timm, and no diffusion model",
        hint=_PIXELS,
        has=(r"(^|\.)features\.0\.(0\.)?weight$", r"(^|\.)classifier\.(\d+\.)*weight$"),
    ),
)
"""By the names of tensors, the particular before the general."""


def check_names(state: State, source: str, *, around: bool = False) -> None:
    """Refuses tensors that are of a kind with a name.

    Args:
        state: Under their full names, or without what they share.
        source: What to call the file in errors.
        around: Whether only what stands around a network is looked for.

    Raises:
        CheckpointError: They are.
    """
    names = "\n".join(map(str, state))
    for kind in KINDS:
        if (kind.around or not around) and kind.matches(state, names):
            raise CheckpointError(f"{source} is {kind.says}.", hint=kind.hint)


def check_content(content: Any, source: str, siblings: str) -> None:
    """Refuses contents that hold no network, or one without names.

    Args:
        content: What the file holds, as it was read.
        source: What to call the file in errors.
        siblings: What the weights may be called beside it, or empty.

    Raises:
        CheckpointError: It is such a file.
    """
    beside = f"The weights are usually beside it: ddpm-deploy export {siblings}"
    if isinstance(content, list | tuple) and any(_has_names(each) for each in content):
        at = next(i for i, each in enumerate(content) if _has_names(each))
        raise CheckpointError(
            f"{source} holds a list of {len(content)}, as ermongroup/ddim saves it, not a "
            "dictionary of tensors.",
            hint=f"Save the weights alone: torch.save(torch.load(FILE)[{at}], 'ckpt.pt'); the last "
            "of the list may be the EMA's.",
        )
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{source} holds a {type(content).__name__}, not a dictionary of tensors.",
            hint="Save the weights alone: torch.save(model.state_dict(), 'ckpt.pt')",
        )
    keys = set(content)
    if keys == {"state", "param_groups"}:
        raise CheckpointError(f"{source} is an optimizer's state, not a network.", hint=beside)
    if "string_to_param" in keys or keys == {"emb_params"}:
        raise _embedding(source)
    if len(keys) <= 2 and any(isinstance(k, str) and k.startswith("<") for k in keys):
        raise _embedding(source)
    if "ds_version" in keys or "dp_world_size" in keys or "zero_stage" in keys:
        module = content.get("module")
        if not (isinstance(module, Mapping) and any(_full(v) for v in module.values())):
            raise CheckpointError(
                f"{source} is a shard of DeepSpeed's ZeRO: a part of the weights, without names.",
                hint="In the folder above: python zero_to_fp32.py . ckpt.pt, and give that file.",
            )
    if not keys:
        return
    training = {"optimizer", "optimizers", "optimizer_states", "lr_scheduler", "lr_schedulers"}
    training |= {
        "scheduler",
        "scaler",
        "epoch",
        "step",
        "global_step",
        "loops",
        "callbacks",
        "args",
    }
    training |= {"rng_state", "random_states", "opt", "optimizer_state_dict", "best_loss"}
    if keys & {"optimizer", "optimizers", "opt", "optimizer_states", "optimizer_state_dict"} and (
        keys <= training
    ):
        raise CheckpointError(
            f"{source} is the state of a training without its network: "
            f"{', '.join(sorted(map(str, keys)))}.",
            hint=beside,
        )
    if keys & {"python", "random_state", "torch_manual_seed", "numpy_random_seed"}:
        raise CheckpointError(
            f"{source} is the state of random generators, as accelerate saves it.", hint=beside
        )
    if {"last_epoch", "base_lrs"} & keys:
        raise CheckpointError(f"{source} is a learning-rate scheduler's state.", hint=beside)


def list_without_names(source: str, where: str, *, others: bool) -> CheckpointError:
    """Returns the error for an EMA that is a list (`shadow_params` of diffusers and torch_ema)."""
    return CheckpointError(
        f"{source} holds its EMA weights as a list without names ({where}).",
        hint=(
            "For the weights that are not averaged: --weights online. For the EMA's, "
            if others
            else ""
        )
        + "where it was trained: ema.copy_to(model.parameters()); "
        "torch.save(model.state_dict(), 'ema_ckpt.pt')",
    )


def _embedding(source: str) -> CheckpointError:
    return CheckpointError(
        f"{source} is a textual inversion: embeddings for words of Stable Diffusion.", hint=_LATENT
    )


def _has_names(value: Any) -> bool:
    return isinstance(value, Mapping) and any(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    )


def _full(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


PICKLES: tuple[tuple[str, str, str], ...] = (
    (
        "torch_utils.persistence",
        "NVlabs' StyleGAN and EDM save their networks so, with the source code inside",
        "Their networks take a continuous noise level, or draw in one step. " + _PIXELS,
    ),
    ("ultralytics.", "YOLO of ultralytics is saved so", "yolo export model=FILE format=onnx"),
    ("models.yolo.", "YOLOv5 is saved so", "python export.py --weights FILE --include onnx"),
    (
        "torch.nn.",
        "Whole modules are saved so, by torch.save(model)",
        "Where the file was made, save the weights alone: "
        "torch.save(model.state_dict(), 'ckpt.pt')",
    ),
    (
        "pytorch_lightning.",
        "Lightning saves its hyper-parameters so",
        "Where the file was made, save the weights alone: torch.save(torch.load(FILE, "
        "weights_only=False)['state_dict'], 'ckpt.pt')",
    ),
    (
        "omegaconf.",
        "A configuration of Hydra or OmegaConf is in it",
        "Where the file was made, save the weights alone: torch.save(torch.load(FILE, "
        "weights_only=False)['state_dict'], 'ckpt.pt')",
    ),
    ("transformers.", "Arguments of transformers' Trainer are saved so", "Give model.safetensors"),
    ("sklearn.", "Scikit-learn saves its models so", _PIXELS),
    ("pandas.", "Pandas saves its tables so", _PIXELS),
    ("dnnlib.", "NVlabs' StyleGAN2 saves its networks so", _PIXELS),
    ("jax", "JAX saves its arrays so", "Convert the weights to PyTorch, and save a state dict."),
    ("tensorflow.", "TensorFlow saves its objects so", _PIXELS),
)
"""What a pickle asks for, who saves such pickles, and what to do."""


def pickle_of(asked: str) -> tuple[str, str]:
    """Returns who saves a pickle that asks for a name, as a sentence, and a hint; or nothing."""
    for start, says, hint in PICKLES:
        if asked.startswith(start):
            return f" {says}.", hint
    return "", ""
