"""Text to ids and back, and conversations to ids. Nothing above this room handles strings and ids at once but the face."""
