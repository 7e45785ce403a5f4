"""One category through one of anomalib's models: run by `side_by_side` with the Python that has anomalib.

Imports nothing of clbench. Reads its settings as JSON from the first argument, writes maps and scores of the test
images and the seconds it took to the file that they name.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from anomalib.data import MVTecAD
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from anomalib.engine import Engine
from anomalib.models import Cfa, Draem, EfficientAd, Fastflow, ReverseDistillation, Stfpm, Supersimplenet
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torchvision.transforms.v2 import Compose, Normalize, Resize

IMAGENET = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def use_local_weights(checkpoint: str) -> None:
    """Let timm and torchvision take `pretrained` weights from a file."""
    state = load_file(checkpoint)
    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **settings: object) -> torch.nn.Module:
        model = create(name, pretrained=False, **settings)
        if pretrained:
            missing = model.load_state_dict(state, strict=False).missing_keys
            assert not missing, missing
        return model

    timm.create_model = create_model

    def resnet18(weights: object = None) -> torch.nn.Module:
        model = original(weights=None)
        model.load_state_dict(state, strict=False)  # the file may lack the last level, which is not run
        return model

    original = torchvision.models.resnet18
    torchvision.models.resnet18 = resnet18


def build(settings: dict) -> torch.nn.Module:
    """The model as its authors set it, but for where weights and pictures come from."""
    size = (settings["size"], settings["size"])
    method = settings["method"]
    normalised = PreProcessor(transform=Compose([Resize(size, antialias=True), IMAGENET]))
    common = {"post_processor": False, "evaluator": False, "visualizer": False}
    if method == "stfpm":
        return Stfpm(backbone="resnet18", pre_processor=normalised, **common)
    if method == "cfa":
        return Cfa(backbone="resnet18", pre_processor=normalised, **common)
    if method == "fastflow":
        return Fastflow(backbone="resnet18", pre_processor=normalised, **common)
    if method == "rd4ad":
        return ReverseDistillation(backbone="resnet18", pre_processor=normalised, **common)
    if method == "supersimplenet":
        return Supersimplenet(backbone="resnet18", pre_processor=normalised, **common)
    plain = PreProcessor(transform=Resize(size, antialias=True))
    if method == "draem":
        model = Draem(dtd_dir=settings["pictures"], pre_processor=plain, **common)
        narrow(model.model, settings["narrow"])
        return model
    model = EfficientAd(imagenet_dir=settings["pictures"], model_size="medium", pre_processor=plain, **common)
    narrow(model.model, settings["narrow"])
    model.model.teacher_out_channels //= settings["narrow"]

    def load_teacher() -> None:
        given = list(load_file(settings["teacher"]).items())
        given.sort(key=lambda item: (int(item[0].split(".")[0]), item[0].endswith("bias")))
        names = model.model.teacher.state_dict()
        model.model.teacher.load_state_dict({n: t for n, (_, t) in zip(names, given, strict=True)})

    model.prepare_pretrained_model = load_teacher
    return model


def narrow(network: torch.nn.Module, factor: int) -> None:
    """Divide the channels of every layer by a factor, but for images, masks and their logits."""
    if factor == 1:
        return

    def fewer(channels: int) -> int:
        return channels if channels <= 6 else channels // factor

    for name, module in network.named_children():
        if isinstance(module, torch.nn.Conv2d):
            channels = fewer(module.in_channels), fewer(module.out_channels)
            window = module.kernel_size, module.stride, module.padding
            setattr(network, name, torch.nn.Conv2d(*channels, *window))
        elif isinstance(module, torch.nn.BatchNorm2d):
            setattr(network, name, torch.nn.BatchNorm2d(fewer(module.num_features)))
        else:
            narrow(module, factor)


class Epochs(Callback):
    """Seconds of every epoch and of every step, at a learning rate of one's own where there is one."""

    def __init__(self, learning_rate: float | None) -> None:
        self.epochs: list[float] = []
        self.steps: list[float] = []
        self.learning_rate = learning_rate

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        if self.learning_rate:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = self.learning_rate

    def on_train_epoch_start(self, *_: object) -> None:
        self.begun = time.perf_counter()
        self.last = self.begun

    def on_train_batch_end(self, *_: object) -> None:
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.last = now

    def on_train_epoch_end(self, *_: object) -> None:
        wait()
        self.epochs.append(time.perf_counter() - self.begun)


def wait() -> None:
    """For what a GPU was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def simulation(settings: dict) -> float:
    """Milliseconds an image of simulating DRAEM's anomalies."""
    generator = PerlinAnomalyGenerator(settings["pictures"], blend_factor=(0.1, 1.0))
    images = torch.rand(8, 3, 256, 256)
    generator(images)
    begin = time.perf_counter()
    for _ in range(settings["batches"]):
        generator(images)
    return 1000 * (time.perf_counter() - begin) / settings["batches"] / len(images)


def main() -> None:
    """Fit, predict, write."""
    settings = json.loads(sys.argv[1])
    torch.manual_seed(settings.get("seed", 0))
    if settings["method"] == "simulation":
        print(simulation(settings))
        return
    use_local_weights(settings["checkpoint"])
    data = MVTecAD(
        root=settings["root"],
        category=settings["category"],
        train_batch_size=settings["batch_size"],
        eval_batch_size=16,
        num_workers=settings["workers"],
    )
    model = build(settings)
    epochs = Epochs(settings["learning_rate"])
    limit = settings.get("steps")
    engine = Engine(
        max_epochs=settings["epochs"],
        accelerator=settings["device"],
        precision=settings["precision"],
        logger=False,
        default_root_dir=settings["folder"],
        callbacks=[epochs],
        num_sanity_val_steps=0,
        check_val_every_n_epoch=settings["epochs"],
        enable_progress_bar=False,
        **({"limit_train_batches": limit} if limit else {}),
    )
    engine.fit(model=model, datamodule=data)
    model.eval().to(settings["device"])
    maps, scores, paths, seconds = [], [], [], 0.0
    # In the precision that it was trained in, as its own engine predicts.
    mixed = torch.autocast(settings["device"], torch.bfloat16, settings["precision"] == "bf16-mixed")
    with torch.no_grad(), mixed:
        for batch in data.test_dataloader():
            begin = time.perf_counter()
            images = batch.image.to(settings["device"])
            prediction = model.model(model.pre_processor.transform(images))
            found = prediction.anomaly_map.float().cpu()
            seconds += time.perf_counter() - begin
            maps.append(found.reshape(len(batch.image), *found.shape[-2:]).numpy())
            scores.append(prediction.pred_score.float().cpu().reshape(-1).numpy())
            paths += [str(Path(path).relative_to(settings["root"])) for path in batch.image_path]
    np.savez(
        settings["output"],
        maps=np.concatenate(maps),
        scores=np.concatenate(scores),
        paths=np.array(paths),
        epochs=np.array(epochs.epochs),
        steps=np.array(epochs.steps),
        image_seconds=seconds / len(paths),
    )


if __name__ == "__main__":
    main()
