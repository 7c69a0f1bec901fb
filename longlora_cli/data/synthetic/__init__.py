"""Synthetic chats: lines hidden in real text, asked for in one conversation. `tasks.TASKS` lists the tasks."""

from __future__ import annotations

from longlora_cli.data.synthetic.needle import Fact, RetrievalChat, make_retrieval_chat
from longlora_cli.data.synthetic.placing import SyntheticChat
from longlora_cli.data.synthetic.tasks import TASKS, make_training_chat

__all__ = ["TASKS", "Fact", "RetrievalChat", "SyntheticChat", "make_retrieval_chat", "make_training_chat"]
