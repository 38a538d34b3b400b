"""CLIP scorers: CLIPScore, HPSv2, PickScore, Social Reward, and the aesthetic predictor on CLIP features."""
