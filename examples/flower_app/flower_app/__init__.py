"""An app of a Flower user: his model, his data, his ServerApp and ClientApp; the strategy is FedSVD."""
