"""Who remembers which page, where, until when. Imports ``kernels`` for layout words only."""
