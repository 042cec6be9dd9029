from little_fixtures import little_pack, little_pack_folder, retriever, tiny_encoder, tiny_encoder_folder

__all__ = ["little_pack", "little_pack_folder", "retriever", "tiny_encoder", "tiny_encoder_folder"]
