/* What the quantizers have in common, whatever instruction set they are made for. */
#define MAX_GROUP 128
#define DQ_BLOCK 256
#define DQ_GROUP 32
#define DQ_GROUPS 8
#define ROUNDER 0x1.8p23f
#define STEP (8 / LANES) /* vectors of eight lanes, which all sums have */
#define TYPE_BF16 0
#define TYPE_F16 1
#define TYPE_F32 2

/* flashpack.formats.starts.STARTS, by bits */
#define STARTS 4
TABLE float starts_of[9][STARTS] = {
    {0}, {0},
    {0.5f, 0.65f, 0.8f, 0.95f}, {0.65f, 0.77f, 0.88f, 1.0f}, {0.75f, 0.84f, 0.92f, 1.0f},
    {0.85f, 0.9f, 0.95f, 1.0f}, {0.92f, 0.95f, 0.98f, 1.0f}, {0}, {0.97f, 0.98f, 0.99f, 1.0f},
};
