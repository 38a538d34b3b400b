# Align Stable Diffusion 1.5 on your own pairs: draw candidates, choose, train, measure, share.
#
#     bash examples/align_own_pairs.sh
#
# It reads prompts.txt and held_out.txt, one prompt a line: what you want to draw, and prompts to measure on. For another
# model change MODEL and the config; README.md has a table of models and cards.
set -e
MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5

# Two images of every prompt, to choose from.
diffalign generate --pipeline $MODEL --prompts prompts.txt --samples-per-prompt 2 --out candidates
# A page in the browser shows two images at a time; Ctrl-C ends it, and it continues later. 200 choices are a beginning.
diffalign user choose candidates --wanted 200 --out mine
# A LoRA on the choices. mine/aligned/ holds the curves, the samples during training and the export.
diffalign train diffusion_dpo --config sd15_lora backbone.path=$MODEL data.path=mine/choices.jsonl run.folder=mine/aligned

# Did it work? New prompts, the same noise for both models, a scorer that was not trained on.
diffalign generate --pipeline $MODEL --prompts held_out.txt --samples-per-prompt 2 --out images/base
diffalign generate --pipeline $MODEL --lora mine/aligned/export --prompts held_out.txt --samples-per-prompt 2 --out images/aligned
diffalign eval win_rate images/base images/aligned --scorer pickscore --out win_rate.json
diffalign eval report --base images/base --aligned images/aligned --win-rate win_rate.json --run mine/aligned --out report
# mine/aligned/export/README.md now is a model card with these numbers. To share it:
#     diffalign push mine/aligned OWNER/NAME --private
