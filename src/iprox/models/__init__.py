"""Models seen as linear layers: finding them, replacing them, watching them, saving them, their loss."""
