"""The transfer-learning tutorial with torchvision's resnet18 as a fixed feature extractor."""

import copy

import torch
import torch.nn as nn
import torch.optim as optim
from torch.optim import lr_scheduler
from torchvision import models
from torchvision.transforms import v2

torch.manual_seed(0)
data_transforms = v2.Compose(
    [v2.RandomHorizontalFlip(), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
)
inputs, labels = torch.rand(64, 3, 32, 32), torch.randint(0, 2, (64,))


def train_model(model, criterion, optimizer, scheduler, num_epochs=3):
    best, best_acc = copy.deepcopy(model.state_dict()), 0.0
    for epoch in range(num_epochs):
        for phase in ["train", "val"]:
            model.train() if phase == "train" else model.eval()
            corrects = 0
            for i in range(0, 64, 16):
                x, y = data_transforms(inputs[i : i + 16]), labels[i : i + 16]
                optimizer.zero_grad()
                with torch.set_grad_enabled(phase == "train"):
                    outputs = model(x)
                    _, preds = torch.max(outputs, 1)
                    loss = criterion(outputs, y)
                    if phase == "train":
                        loss.backward()
                        optimizer.step()
                corrects += torch.sum(preds == y.data)
            if phase == "train":
                scheduler.step()
            elif corrects / 64 > best_acc:
                best_acc = corrects / 64
                best = copy.deepcopy(model.state_dict())
        print(f"epoch {epoch} best {best_acc:.3f}")
    model.load_state_dict(best)
    return model


model_conv = models.resnet18(weights=None)
for param in model_conv.parameters():
    param.requires_grad = False
num_ftrs = model_conv.fc.in_features
model_conv.fc = nn.Linear(num_ftrs, 2)
criterion = nn.CrossEntropyLoss()
optimizer_conv = optim.SGD(model_conv.fc.parameters(), lr=0.001, momentum=0.9)
exp_lr_scheduler = lr_scheduler.StepLR(optimizer_conv, step_size=7, gamma=0.1)
model_conv = train_model(model_conv, criterion, optimizer_conv, exp_lr_scheduler)
