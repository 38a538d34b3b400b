# Draw many images of each prompt, score them and keep the best ones. No training.
#
#     bash examples/best_of_n.sh
#
# It reads prompts.txt, one prompt a line.
set -e
MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5
SCORER=pickscore

diffalign generate --pipeline $MODEL --prompts prompts.txt --samples-per-prompt 8 --out many
# best.csv has the best image of each prompt; scores.html shows the distributions, the best and the worst.
reward-score many --scorer $SCORER --out scores.csv --best best.csv --report scores.html
# The same images as ranked groups: training data of `rank_dpo`, if best of n is too slow to be used every time.
diffalign eval rank_images many --scorer $SCORER --out ranked.jsonl
