"""Models as linear layers: find, replace and observe layers; load and save models; losses."""
