"""Transfer learning: a frozen backbone, a new head, and only the head in the optimizer."""

import copy

import torch
from torch import nn, optim
from torch.optim import lr_scheduler


class Backbone(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))


torch.manual_seed(0)
torch.save(Backbone().state_dict(), "pretrained.pt")
batches = {
    phase: [(torch.randn(16, 3, 8, 8), torch.randint(0, 2, (16,))) for _ in range(6)]
    for phase in ("train", "val")
}

model_conv = Backbone()
model_conv.load_state_dict(torch.load("pretrained.pt", weights_only=True))
for param in model_conv.parameters():
    param.requires_grad = False
num_ftrs = model_conv.fc.in_features
model_conv.fc = nn.Linear(num_ftrs, 2)
criterion = nn.CrossEntropyLoss()
optimizer_conv = optim.SGD(model_conv.fc.parameters(), lr=0.01, momentum=0.9)
exp_lr_scheduler = lr_scheduler.StepLR(optimizer_conv, step_size=7, gamma=0.1)

best_acc, best_state = 0.0, None
for epoch in range(2):
    for phase in ["train", "val"]:
        if phase == "train":
            model_conv.train()
        else:
            model_conv.eval()
        running_corrects = 0
        for inputs, labels in batches[phase]:
            optimizer_conv.zero_grad()
            with torch.set_grad_enabled(phase == "train"):
                outputs = model_conv(inputs)
                _, preds = torch.max(outputs, 1)
                loss = criterion(outputs, labels)
                if phase == "train":
                    loss.backward()
                    optimizer_conv.step()
            running_corrects += torch.sum(preds == labels.data)
        if phase == "train":
            exp_lr_scheduler.step()
        accuracy = running_corrects.double() / (16 * len(batches[phase]))
        print(epoch, phase, f"{accuracy:.3f}")
        if phase == "val" and accuracy > best_acc:
            best_acc, best_state = accuracy, copy.deepcopy(model_conv.state_dict())
