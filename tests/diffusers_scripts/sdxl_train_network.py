"""The frame of sd-scripts' sdxl_train_network.py around random data and a tiny network."""

import train_network


class SdxlNetworkTrainer(train_network.NetworkTrainer):
    def call_unet(self, args, unet, noisy_latents, timesteps):
        return unet(noisy_latents.float(), timesteps)


def setup_parser():
    parser = train_network.setup_parser()
    parser.add_argument("--cache_text_encoder_outputs", action="store_true")
    return parser


if __name__ == "__main__":
    parser = setup_parser()
    args = parser.parse_args()
    SdxlNetworkTrainer().train(args)
