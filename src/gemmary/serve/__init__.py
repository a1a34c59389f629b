"""The OpenAI-compatible server: `gemmary serve`. `protocol` is what may be asked, `guards` and `connection` who may ask and how."""
