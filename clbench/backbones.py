"""Frozen feature pyramids from timm: a network sees an image once per run."""

import difflib
import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit
from urllib.request import getproxies
from weakref import WeakKeyDictionary

import timm
import torch
from huggingface_hub import constants
from pydantic import AfterValidator, NonNegativeInt, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import Format
from timm.models._features import FeatureGetterNet  # private, so that pyproject.toml bounds timm above
from torch import Tensor, nn

from clbench.data.images import Identity, Images, identities, origin, sent
from clbench.errors import UserError, counted, first_line
from clbench.feature_store import FeatureStore
from clbench.out_of_memory import is_out_of_memory
from clbench.paths import PATH_FOR_USE, absolute_path, expanded
from clbench.randomness import seed_for
from clbench.tokens import Transformer, embed_as_trained, patch_side

PACKAGED = "package:"  # a checkpoint that the package ships

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


def _ascending(layers: list[int]) -> list[int]:
    if not layers or layers != sorted(set(layers)) or layers[0] < 0:
        raise ValueError("name at least one level, each once and in ascending order, e.g. [1,2,3]")
    return layers


def existing_weights(name: str) -> str:
    """The absolute path of a file of weights, when a config is checked; `package:NAME` stays as it is.

    Raises:
        ValueError: it is not there.
    """
    path = name if name.startswith(PACKAGED) else absolute_path(name)
    if not weights_path(path).is_file():
        raise ValueError("it does not exist: give a .safetensors or .pth file")
    return path


Weights = Annotated[str, AfterValidator(existing_weights), PATH_FOR_USE]  # a file of weights


@contextmanager
def _asking_hub() -> Iterator[str | None]:
    """Inside, timm asks its hub for weights once, and in silence.

    Where the hub's name is not known here, its client would try a dozen times over most of a minute, with a line for each;
    now it looks into its cache alone. Gives why the hub cannot be asked; None where it may be there.
    """
    logger, before = logging.getLogger("huggingface_hub"), constants.HF_HUB_OFFLINE
    host, unreachable, level = urlsplit(constants.ENDPOINT).hostname, None, logger.level
    if not getproxies():
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            unreachable = f"{host} is not known on this machine"
    logger.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = before or unreachable is not None
    try:
        yield unreachable
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE = before


Layers = Annotated[list[int], AfterValidator(_ascending)]  # levels of a pyramid


class Backbone:
    """Which frozen network to take features from; detectors ask it for the levels they need.

    Args:
        name: a timm model.
        pretrained: whether timm downloads its weights, where no checkpoint is given; else they are random.
        checkpoint: a file of weights, .safetensors or .pth (tensors only), or `package:NAME`, which the package has.
        arguments: further arguments of `timm.create_model`.
        antialias: whether a transformer's position embedding is resized as timm does it, with antialiasing; else as
            DINOv2's code does. It is resized for images of another size than it was trained with, where
            `arguments={dynamic_img_size: true}`.
        seed: of random weights.
        batch_size: images the network sees at a time.
        feature_memory_mb: features that are kept in memory so that an image is seen once per run, 10^6 bytes.
        feature_disk_mb: features that are kept in a temporary file after that; what does not fit is computed again.

    Raises:
        UserError: timm has no such model.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = True,
        checkpoint: Weights | None = None,
        arguments: Mapping[str, Any] | None = None,
        antialias: bool = True,
        seed: int = 0,
        batch_size: PositiveInt = 16,
        feature_memory_mb: NonNegativeInt = 2000,
        feature_disk_mb: NonNegativeInt = 4000,
    ):
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"; nearest: {', '.join(close)}" if close else "; timm.list_models() has all names"
            raise UserError(f"backbone.name={name} is not a timm model{hint}")
        self.name = name
        self.pretrained = pretrained
        self.checkpoint = checkpoint
        self.arguments = dict(arguments or {})
        self.antialias = antialias
        self.seed = seed
        self.batch_size = batch_size
        self.store_limits = feature_memory_mb * 10**6, feature_disk_mb * 10**6

    def pyramid(self, layers: list[int]) -> "FeaturePyramid":
        """The frozen network up to the last of `layers`, giving those levels.

        Args:
            layers: numbers of levels from 0, ascending (timm's `out_indices`); a transformer's are its blocks.

        Raises:
            UserError: no such level, weights that cannot be downloaded, or weights that do not fit.
        """
        return self._frozen(lambda pretrained: self._create(layers, pretrained))

    def tokens(self, layers: list[int]) -> "FeaturePyramid":
        """The frozen network giving levels, and for a transformer one vector for the image [B, d] after them.

        `clbench.methods.patches.tokens` makes patches of them, and of any other network's levels the vector too.

        Args:
            layers: as for `pyramid`. A transformer's go through its last normalisation.

        Raises:
            UserError: as `pyramid`.
        """
        if not self._is_transformer():
            return self.pyramid(layers)
        return self._frozen(
            lambda pretrained: self._transformer(
                [[layer] for layer in layers], pretrained, f"method.layers={layers}", normalised=True
            )
        )

    def blocks(self, groups: Sequence[Sequence[int]], setting: str) -> "FeaturePyramid":
        """A frozen transformer giving all tokens as its blocks give them, [B, P + N, d] for each group: their mean.

        Args:
            groups: of blocks, numbered from 0.
            setting: what they were given with, `key=value`, quoted in error messages.

        Raises:
            UserError: the network is no transformer; and as `pyramid`.
        """
        if not self._is_transformer():
            raise UserError(
                f"backbone.name={self.name} is no vision transformer, and the method takes a transformer's tokens: take "
                "backbone=dinov2_small or another of conf/backbone that is one"
            )
        return self._frozen(
            lambda pretrained: self._transformer(groups, pretrained, setting, normalised=False, prefix=True)
        )

    def _frozen(self, create: Callable[[bool], nn.Module]) -> "FeaturePyramid":
        """A frozen network, its weights loaded; `create` is told whether timm is to download them."""
        torch.manual_seed(seed_for(self.seed, "backbone weights"))
        network = create(self.pretrained and self.checkpoint is None)
        if self.checkpoint is not None:
            self._load(network, self.checkpoint)
        if isinstance(network, Transformer):
            channels = [network.width] * len(network.groups)
        else:
            channels = _info(network).channels()
        return FeaturePyramid(
            network,
            name=f"backbone.name={self.name}",
            channels=channels,
            whole_parameters=self._whole_parameters(),
            store=FeatureStore(*self.store_limits),
            batch_size=self.batch_size,
            normalisation=self._normalisation(network),
            normalised=isinstance(network, FeatureGetterNet),
            licence=self._licence(),
        )

    def student(self, layers: list[int]) -> "Student":
        """A network of the same architecture and levels to be trained, its weights random by seed.

        Raises:
            UserError: no such level.
        """
        torch.manual_seed(seed_for(self.seed, "student weights"))
        network = self._create(layers, pretrained=False)
        return Student(network, self._whole_parameters(), self._normalisation(network))

    def _create(self, layers: list[int], pretrained: bool) -> nn.Module:
        """A network, images [B, 3, H, W] -> levels [B, C_l, H_l, W_l]; random weights are by torch's global seed."""
        with self._creating(f"method.layers={layers} are not all levels", pretrained):
            if self._kind(layers) is FeatureGetterNet:
                # A transformer: its last normalisation is for the tokens of any block.
                whole = self._whole(pretrained)
                network = FeatureGetterNet(whole, out_indices=tuple(layers), norm=True)
                network.pretrained_cfg = whole.pretrained_cfg
                return network
            levels: nn.Module = timm.create_model(
                self.name,
                features_only=True,
                out_indices=tuple(layers),
                pretrained=pretrained,
                **self.arguments,
            )
            if getattr(levels, "output_fmt", None) == Format.NHWC:  # swin
                levels.register_forward_hook(_channels_first)
            return levels

    def _transformer(
        self, groups: Sequence[Sequence[int]], pretrained: bool, setting: str, **forms: bool
    ) -> Transformer:
        """A transformer whose blocks give tokens; random weights are by torch's global seed."""
        with self._creating(f"the blocks of {setting} are not all blocks", pretrained):
            whole = self._whole(pretrained)
            network = Transformer(whole, groups, **forms)
            network.pretrained_cfg = whole.pretrained_cfg
            return network

    def _whole(self, pretrained: bool) -> nn.Module:
        whole: nn.Module = timm.create_model(self.name, pretrained=pretrained, **self.arguments)
        if not self.antialias:
            embed_as_trained(whole)
        return whole

    def _kind(self, layers: Sequence[int]) -> type[nn.Module]:
        """What class gives the network's levels."""
        with torch.device("meta"):
            network = timm.create_model(
                self.name, features_only=True, out_indices=tuple(layers), pretrained=False, **self.arguments
            )
        return type(network)

    def _is_transformer(self) -> bool:
        with self._creating("level 0 is none", pretrained=False):
            return self._kind([0]) is FeatureGetterNet

    @contextmanager
    def _creating(self, misfit: str, pretrained: bool) -> Iterator[None]:
        """Inside, timm makes a network; what it raises comes out as a UserError that says what to do.

        Args:
            misfit: what is wrong where the network has not all that is asked for, up to the "of".
            pretrained: whether timm downloads its weights.
        """
        unreachable = None
        try:
            with _asking_hub() if pretrained else nullcontext() as unreachable:
                yield
        except (IndexError, AssertionError) as error:
            raise UserError(
                f"{misfit} of backbone.name={self.name}: "
                f"it has {self._levels()}, numbered from 0; give others, or a backbone that has these, as benchmark=paper "
                "does for methods that are made for one"
            ) from error
        except TypeError as error:
            raise UserError(
                f"backbone.arguments={self.arguments} do not suit {self.name} ({first_line(error)}): give others, or "
                f"backbone=timm backbone.name={self.name}, which has none"
            ) from error
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if not pretrained:
                raise UserError(
                    f"backbone.name={self.name} cannot give a feature pyramid: {error}"
                ) from error
            raise UserError(
                f"the pretrained weights of backbone.name={self.name} could not be downloaded "
                f"({unreachable or first_line(error)}): on a machine with a network, save timm.create_model('{self.name}', "
                "pretrained=True).state_dict() with safetensors, bring the file here and set "
                "backbone.checkpoint=FILE (--replace backbone.checkpoint=FILE where a trained detector is used); or "
                "take backbone=small, which needs no download"
            ) from error

    def _licence(self) -> str | None:
        """The licence of the weights by timm's description; None for random ones, or where it has none."""
        described = timm.get_pretrained_cfg(self.name, allow_unregistered=True)
        named = self.pretrained or (self.checkpoint is not None and not self.checkpoint.startswith(PACKAGED))
        return described.license if described and named else None

    def _normalisation(self, network: nn.Module) -> "Normalisation":
        """Mean and deviation from timm's description, ImageNet's where it has none."""
        described: Any = network.pretrained_cfg if hasattr(network, "pretrained_cfg") else network.default_cfg
        return Normalisation(
            described.get("mean") or IMAGENET_MEAN, described.get("std") or IMAGENET_DEVIATION
        )

    def _levels(self) -> str:
        """How many levels there are, for an error message."""
        try:
            if self._kind([0]) is FeatureGetterNet:
                with torch.device("meta"):
                    return f"{len(_info(timm.create_model(self.name, **self.arguments)))} blocks"
            with torch.device("meta"):
                reductions = _info(timm.create_model(self.name, features_only=True)).reduction()
        except (RuntimeError, AssertionError, AttributeError, TypeError, IndexError):
            # These words are for an error that is on its way.
            return "other levels"
        return counted(len(reductions), "level")

    def _whole_parameters(self) -> int:
        """Parameters of the whole classification network, which the paper counts as the architecture."""
        with torch.device("meta"):
            whole = timm.create_model(self.name, pretrained=False, **self.arguments)
        return sum(parameter.numel() for parameter in whole.parameters())

    def _load(self, network: nn.Module, checkpoint: str) -> None:
        state = read_weights(weights_path(checkpoint), "backbone.checkpoint")
        # timm wraps a transformer to give levels; its weights are saved without the wrapper.
        inner = network.model if isinstance(network, FeatureGetterNet | Transformer) else network
        wanted = inner.state_dict()
        # Checkpoints of whole networks bring levels that nobody asked for, and their classifier.
        missing = [key for key in wanted if key not in state]
        wrong = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
        if missing or wrong:
            examples = ", ".join(
                [f"no {key}" for key in missing[:3]]
                + [f"{key} is {list(state[key].shape)}, not {list(wanted[key].shape)}" for key in wrong[:3]]
            )
            raise UserError(
                f"backbone.checkpoint={checkpoint} does not fit backbone.name={self.name} "
                f"({counted(len(missing), 'tensor')} missing, {len(wrong)} of another size: {examples}): "
                "give the weights of that timm model, or name the model they are of"
            )
        inner.load_state_dict({key: state[key] for key in wanted})


def read_weights(path: Path, setting: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, which is never unpickled.

    Args:
        setting: name of the config key or option that names the file, quoted in error messages.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        UserError: the file does not exist, cannot be read, or holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"{setting}={path} does not exist: give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{setting}={path} cannot be read: {first_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError and what it wraps
        if is_out_of_memory(error):
            raise
        if "global" not in str(error).lower():
            raise UserError(f"{setting}={path} cannot be read: it is no file of tensors") from error
        raise UserError(
            f"{setting}={path} holds more than tensors and is not unpickled: "
            "save its state_dict() as .safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{setting}={path} is not a dictionary of tensors: save a state_dict()")
    return state


def weights_path(name: str) -> Path:
    """The file that a setting names: a path, or `package:NAME` for one of the package's weights."""
    if name.startswith(PACKAGED):
        return Path(__file__).parent / "weights" / name.removeprefix(PACKAGED)
    return expanded(name)


class Normalisation(nn.Module):
    """Images as a network was trained to see them: minus a mean, over a deviation.

    Args:
        mean, deviation: of red, green and blue, of images in [0, 1]; ImageNet's by default.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, mean: Sequence[float] = IMAGENET_MEAN, deviation: Sequence[float] = IMAGENET_DEVIATION
    ):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images, uint8 or float in [0, 1], [B, 3, H, W] -> normalised, float32."""
        return (unit(images) - self.mean) / self.deviation


class Student(nn.Module):
    """A network to be trained, of which only the first levels are run.

    Args:
        network: normalised images [B, 3, H, W] -> levels [B, C_l, H_l, W_l].
        whole_parameters: number of parameters of the whole network, which the paper counts.
        normalisation: of the images it takes.
    """

    def __init__(self, network: nn.Module, whole_parameters: int, normalisation: Normalisation):
        super().__init__()
        self.network = network
        self.whole_parameters = whole_parameters
        self.normalisation = normalisation

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images, uint8 or float in [0, 1], [B, 3, H, W] -> levels [B, C_l, H_l, W_l]."""
        return self.network(self.normalisation(images))


class FeaturePyramid(nn.Module):
    """A frozen network that gives levels of features, each image's computed once.

    The network always sees batches of the same size, so that an image's features do not depend on which images it comes
    with. One that is not full is filled up with images that will be asked for later, as long as their features have
    room, and else with copies. On a GPU, which does not give equal digits anyway unless `gpu.deterministic` asks for them, the
    copies are left out.

    Args:
        network: normalised images [B, 3, H, W] -> levels [B, C_l, H_l, W_l].
        name: the network's, quoted in error messages.
        channels: C_l of each level.
        whole_parameters: number of parameters of the whole network, of which only the first levels are run.
        store: keeps the levels of images that were seen.
        batch_size: images the network sees at a time.
        normalisation: of the images it takes; ImageNet's where none is given.
        normalised: whether the levels come from a transformer's normalisation of its tokens.
        licence: of its weights; None where it is not known or they are random.

    Attributes:
        dtype: of mixed precision inside the network; None for single precision.
        filled_up: whether batches that are not full are filled up with copies, where digits are to be equal.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        channels: list[int],
        whole_parameters: int,
        store: FeatureStore,
        batch_size: int,
        normalisation: Normalisation | None = None,
        normalised: bool = False,
        licence: str | None = None,
    ):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.normalised = normalised
        self.licence = licence
        self.name = name
        self.channels = channels
        self.whole_parameters = whole_parameters
        self.store = store
        self.batch_size = batch_size
        self.dtype: torch.dtype | None = None
        self.filled_up = True
        self.normalisation = normalisation or Normalisation()
        # How many images of each source were looked at to fill up batches.
        self._looked: WeakKeyDictionary[Images, int] = WeakKeyDictionary()

    def train(self, mode: bool = True) -> "FeaturePyramid":
        """Always in evaluation mode: frozen normalisation statistics stay as they are."""
        return super().train(False)

    def apply(self, fn: Callable[[nn.Module], Any]) -> "FeaturePyramid":
        """Nothing: what gives a detector's modules their first weights leaves the frozen ones as they are."""
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images, uint8 or float in [0, 1], [B, 3, H, W] -> levels, float32 [B, C_l, H_l, W_l]."""
        if torch.compiler.is_compiling():  # a traced graph takes batches of any size, and keeps nothing
            return self.network(self.normalisation(images))
        if self.store.paused:
            return self.compute(images)
        names = identities(images)
        found = {name: self.store.get(name) for name in names}
        missing = [row for row, name in enumerate(names) if found[name] is None]
        for begin in range(0, len(missing), self.batch_size):
            rows = missing[begin : begin + self.batch_size]
            known, part = [names[row] for row in rows], images
            if len(rows) < len(names):
                part = images[sent(torch.tensor(rows), images.device)]
            if (ahead := self._ahead(images, known)) is not None:
                known, part = known + identities(ahead), torch.cat([part, ahead])
            levels = self.compute(part)
            for place, name in enumerate(known):
                one = [level[place] for level in levels]
                self.store.put(name, one)
                if name in found:
                    found[name] = one
        return [torch.stack(level) for level in zip(*(found[name] for name in names), strict=True)]  # type: ignore[arg-type]

    def _ahead(self, images: Tensor, names: list[Identity]) -> Tensor | None:
        """Images that will be asked for later, uint8 [M, 3, H, W], to fill up a batch that is not whole.

        Args:
            images: some of those that the batch is of, which tell where the others are.
            names: the batch's own.

        Returns:
            At most as many as the batch lacks; None where there are none, or no room for their features.
        """
        source = origin(images)
        if self.store.full or source is None:
            return None
        rows: list[int] = []
        while lacking := self.batch_size - len(names) - len(rows):
            begin = self._looked.get(source[0], 0)
            window = torch.arange(begin, min(begin + lacking, len(source[0])))
            if not len(window):
                break
            for row, name in zip(window.tolist(), source[0].identities(window), strict=True):
                if name not in names and self.store.get(name) is None:
                    rows.append(row)
            self._looked[source[0]] = begin + len(window)
        return source[0][torch.tensor(rows)] if rows else None

    @torch.no_grad()
    def check(
        self,
        images: Tensor,
        sizes: str = "set dataset.resize and dataset.crop",
        own_size: str = "backbone.arguments.img_size=",
    ) -> list[Tensor]:
        """Try an image of the run's size, so that a misfit is known before anything is learned.

        Args:
            images: of any number, [B, 3, H, W]; the first is tried.
            sizes: the way out by images of another size, for the error.
            own_size: what the size that a transformer is made for is given with.

        Returns:
            Its levels, [1, C_l, H_l, W_l].

        Raises:
            UserError: the network takes no images of this size.
        """
        height, width = images.shape[-2:]
        try:
            return self.network(self.normalisation(images[:1]))
        except (RuntimeError, AssertionError, ValueError) as error:
            if is_out_of_memory(error, images.device):
                raise
            own = (
                f"{own_size}{height}" if height == width else f"'{own_size}[{height},{width}]'"
            )  # for the shell
            side = patch_side(self.network)
            if side and (height % side or width % side):
                raise UserError(
                    f"{self.name} has patches of {side}x{side} pixels, and {width}x{height} is no multiple of them: "
                    f"{sizes} to one, e.g. {max(height // side, 1) * side} or {(height // side + 1) * side}"
                ) from error
            raise UserError(
                f"{self.name} takes no images of {width}x{height} ({first_line(error)}): {sizes}, or for a transformer {own}"
            ) from error

    @torch.no_grad()
    def compute(self, images: Tensor) -> list[Tensor]:
        """The levels, float32 [B, C_l, H_l, W_l], of images that are not seen again: none is looked up or kept."""
        parts = [self._whole_batch(part) for part in images.split(self.batch_size)]
        return [torch.cat(levels) if len(parts) > 1 else levels[0] for levels in zip(*parts, strict=True)]

    def _whole_batch(self, images: Tensor) -> list[Tensor]:
        """The levels of at most a batch of images, which is filled up with copies of the first where digits are to be equal."""
        equal = images.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        missing = self.batch_size - len(images) if equal and self.filled_up else 0
        if missing:
            images = torch.cat([images, images[:1].expand(missing, -1, -1, -1)])
        normalised = self.normalisation(images)
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            levels = self.network(normalised)
        return [level[: len(images) - missing].float() for level in levels]


def _channels_first(network: nn.Module, images: Any, levels: list[Tensor]) -> list[Tensor]:
    """Levels [B, H_l, W_l, C_l] -> [B, C_l, H_l, W_l]: a hook of a network."""
    return [level.permute(0, 3, 1, 2).contiguous() for level in levels]


def _info(network: nn.Module) -> Any:
    """timm's `FeatureInfo` of a network's levels: their channels and strides."""
    return network.feature_info


def unit(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]: uint8 is divided by 255, floats are what they should be already."""
    return images.float() / 255 if images.dtype == torch.uint8 else images
