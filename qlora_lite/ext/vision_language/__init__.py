"""Vision-language models that write about pictures in chats: task.kind image-text-to-text."""
