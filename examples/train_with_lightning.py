"""Train a Neural ODE with SNOpt under Lightning: the optimiser is one like any other.

pip install lightning
python examples/train_with_lightning.py [EPOCHS]
"""

import sys

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ocnopt as oc


class Field(nn.Module):
    """A field that does not see the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 48), nn.Tanh(), nn.Linear(48, width))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx/dt, (N, width)."""
        return self.net(x)


class Classifier(lightning.LightningModule):
    """Digits by a Neural ODE between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), oc.NeuralODE(Field(32)), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """The accuracy of a batch."""
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SNOpt takes the module that holds the Neural ODE."""
        return oc.SNOpt(self.model)


def main(epochs: int = 5) -> None:
    lightning.seed_everything(0)
    data = oc.problems.get("digits").build()
    train = DataLoader(TensorDataset(data.train_inputs, data.train_targets), batch_size=128, shuffle=True)
    test = DataLoader(TensorDataset(data.test_inputs, data.test_targets), batch_size=360)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", **quiet)
    model = Classifier()
    trainer.fit(model, train)
    print(f"loss of the last batch {trainer.callback_metrics['loss']:.4f}")
    (measured,) = trainer.test(model, test, verbose=False)
    print(f"test accuracy {100 * measured['accuracy']:.1f} %")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
