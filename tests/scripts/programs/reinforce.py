"""REINFORCE with a learned baseline: actions are sampled, advantages are numbers."""

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.distributions import Categorical

torch.manual_seed(543)
gamma = 0.99


class Corridor:
    """Walk right to the end; each step costs a little."""

    def reset(self):
        self.at = 2
        return F.one_hot(torch.tensor(self.at), 6).float()

    def step(self, action):
        self.at = max(0, min(5, self.at + (1 if action == 1 else -1)))
        done = self.at in (0, 5)
        return F.one_hot(torch.tensor(self.at), 6).float(), float(self.at == 5) - 0.01, done


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.affine1 = nn.Linear(6, 16)
        self.action_head = nn.Linear(16, 2)
        self.value_head = nn.Linear(16, 1)

    def forward(self, x):
        x = F.relu(self.affine1(x))
        return F.softmax(self.action_head(x), dim=-1), self.value_head(x)


env = Corridor()
model = Policy()
optimizer = optim.Adam(model.parameters(), lr=3e-2)
for episode in range(8):
    state, saved_actions, rewards = env.reset(), [], []
    for _ in range(30):
        probs, state_value = model(state)
        m = Categorical(probs)
        action = m.sample()
        saved_actions.append((m.log_prob(action), state_value))
        state, reward, done = env.step(action.item())
        rewards.append(reward)
        if done:
            break
    R, returns = 0.0, []
    for r in rewards[::-1]:
        R = r + gamma * R
        returns.insert(0, R)
    returns = torch.tensor(returns)
    policy_losses, value_losses = [], []
    for (log_prob, value), R in zip(saved_actions, returns, strict=True):
        advantage = R - value.item()
        policy_losses.append(-log_prob * advantage)
        value_losses.append(F.smooth_l1_loss(value, R.view(1)))
    optimizer.zero_grad()
    loss = torch.stack(policy_losses).sum() + torch.stack(value_losses).sum()
    loss.backward()
    optimizer.step()
    print(episode, f"{sum(rewards):.2f}")
