# Learn what one person likes from a few choices, and score and draw for that person. Everything runs on the playground,
# without a GPU; docs/personal.md says what to change for a model and people of your own.
#
#     bash examples/personalise.sh
set -e

# What many people chose, and a scorer of one person at a time that is trained on it.
diffalign playground people --out people
diffalign train personal_reward --config playground data.path=people/choices.jsonl run.folder=runs/personal
# Your own choices: a page in the browser asks what it knows least about.
diffalign playground prompts --n 64 --out prompts.jsonl
diffalign user choose prompts.jsonl --pipeline playground --steps 10 --guidance 1 --encoder runs/personal/export --out me
diffalign user fit me/choices.jsonl --encoder runs/personal/export --out me.safetensors
# Score images for you, and keep the ones that you would like best.
reward-score me/generated --scorer runs/personal/export --user me.safetensors --out mine.csv --best best.csv
# Align the model with your taste: your scorer is the reward.
diffalign train draft --config playground 'reward.scorers=["runs/personal/export,user=me.safetensors"]' run.folder=runs/mine
diffalign generate --pipeline playground --lora runs/mine/export --prompts prompts.jsonl --steps 10 --guidance 1 --out for_me
